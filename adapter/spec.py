"""What a user asks for: one function's needs and policy, from `gpufn.toml` and `gpufn.dev/*` annotations.

One table (`FIELDS`) holds every key: its place in the file, its annotation, its form, its default and
its meaning. All validation is here, the same on every host; the reference page is made from the table.
An annotation wins over the file, so that one image can be deployed with different policies.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import ConfigError, HandlerError
from adapter.keys import CONFIG_FILE, DOMAIN, HANDLER_FILE
from adapter.units import format_size, parse_duration_s, parse_size_bytes

SPOT_WORDS = ("any", "prefer", "avoid", "require", "never")
MAX_REPLICAS = 1000
MAX_GPUS = 64
"""Of one replica."""
MAX_DURATION_S = 30 * 86400.0
MAX_BUDGET_GPU_S = 1e9
"""More than eleven thousand GPUs can hold in a day."""


class Form:
    """How a value is written: parses a TOML value or an annotation's text, or raises `ValueError` saying how.

    `none` is the word that means None; empty where no word does.
    """

    def __init__(self, accepted: str, parse: Callable[[Any], Any], none: str = "") -> None:
        self.accepted = accepted
        self.none = none
        self._parse = parse

    def __call__(self, value: Any) -> Any:
        try:
            return self._parse(value)
        except (ValueError, TypeError, OverflowError) as exc:  # TOML has inf
            raise ValueError(self.accepted) from exc


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _or(none: str, form: Form) -> Form:
    """`form`, or the word that means None."""
    return Form(f"{none}, or {form.accepted}", lambda value: None if value == none else form(value), none)


def _from_to(low: float, high: float, what: str) -> Form:
    def parse(value: Any) -> float:
        number = _number(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return Form(f"{what} from {low:g} to {high:g}", parse)


def _whole(low: int, high: int) -> Form:
    def parse(value: Any) -> int:
        number = _number(value)
        if number != int(number) or not low <= number <= high:
            raise ValueError
        return int(number)

    return Form(f"a whole number from {low} to {high}", parse)


def _duration(low_s: float = 0.0) -> Form:
    def parse(value: Any) -> float:
        seconds = parse_duration_s(value) if isinstance(value, str) else _number(value)
        if not low_s <= seconds <= MAX_DURATION_S:
            raise ValueError
        return seconds

    least = f", at least {low_s:g}s" if low_s else ""
    return Form(f"a duration like 30s, 5m or 1h30m{least}, at most 720h", parse)


def _size() -> Form:
    return Form(
        "a size like 512Mi or 16Gi",
        lambda value: parse_size_bytes(value) if isinstance(value, str) else _whole(0, 2**60)(value),
    )


def _words() -> Form:
    def parse(value: Any) -> tuple[str, ...]:
        words = value.replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError
        return tuple(words)

    return Form('a list of words, ["a", "b"] in the file and "a,b" as an annotation', parse)


def _choice(*words: str) -> Form:
    def parse(value: Any) -> str:
        word = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if word not in words:
            raise ValueError
        return str(word)

    return Form("one of " + ", ".join(words), parse)


def _text() -> Form:
    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        return value

    return Form("text", parse)


def _gpu_count() -> Form:
    def parse(value: Any) -> float:
        number = _number(value)
        if not 0 <= number <= MAX_GPUS or (number > 1 and number != int(number)):
            raise ValueError
        return number

    return Form(f"a whole number of GPUs up to {MAX_GPUS}, or a share of one such as 0.5", parse)


_MIG_PROFILE = re.compile(r"(?:[1-9]c\.)?[1-9]g\.([1-9][0-9]{0,3})gb(?:[+.-][a-z0-9.+-]{1,20})?")
"""Its group is the gigabytes of a slice. Suffixes say what else it has: ``1g.10gb+me``."""


def _mig_profile() -> Form:
    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        profile = value.strip().lower().removeprefix("mig-")
        if profile and not _MIG_PROFILE.fullmatch(profile):
            raise ValueError
        return profile

    return Form("a MIG profile like 1g.5gb or 3g.20gb", parse)


_COMPUTE_CAPABILITY = re.compile(r"(?:>=)?\s*([1-9][0-9]{0,2})(?:\.([0-9]{1,2}))?")


def _compute_capability() -> Form:
    def parse(value: Any) -> tuple[int, int]:
        match = _COMPUTE_CAPABILITY.fullmatch(value.strip() if isinstance(value, str) else f"{_number(value):g}")
        if match is None:
            raise ValueError
        return int(match[1]), int(match[2] or 0)

    return Form("the least compute capability, like 8.0 or >= 8.0", parse)


def _gpu_seconds() -> Form:
    def parse(value: Any) -> float:
        seconds = parse_duration_s(value) if isinstance(value, str) else _number(value)
        if not 0 <= seconds <= MAX_BUDGET_GPU_S:
            raise ValueError
        return seconds

    return Form("GPU-seconds, as a number or as a duration of one GPU like 36h", parse)


@dataclass(frozen=True, slots=True)
class Field:
    """One key that a user may write. `name` is the attribute of `FunctionSpec` that it sets."""

    name: str
    table: str
    key: str
    annotation: str
    form: Form
    default: Any
    doc: str
    is_built_in: bool = False
    """Part of the image: only the file says it, and `annotation` is refused with the reason."""


FIELDS: tuple[Field, ...] = (
    Field("gpus", "gpu", "count", "gpu", _gpu_count(), 0.0, "GPUs for one replica, or a share of one"),
    Field("gpu_models", "gpu", "models", "models", _words(), (), "GPU models in order of preference; empty: any"),
    Field("gpu_memory_bytes", "gpu", "memory", "memory", _size(), 0, "GPU memory of one replica, others may have the rest; 0: its share of the GPU"),
    Field("mig_profile", "gpu", "mig", "mig", _mig_profile(), "", "MIG profile of the slices it needs, on a cluster, `count` of them; empty: none"),
    Field("compute_capability", "gpu", "compute", "compute", _or("any", _compute_capability()), None, "least compute capability of the GPU, on a cluster"),
    Field("spot", "gpu", "spot", "spot", _choice(*SPOT_WORDS), "any", "machines that the provider may take back, on a cluster; require and never are kept to, prefer and avoid weigh"),
    Field("min_replicas", "scale", "min", "min", _whole(0, MAX_REPLICAS), 0, "replicas that stay up without traffic"),
    Field("max_replicas", "scale", "max", "max", _whole(1, MAX_REPLICAS), 1, "replicas under load"),
    Field("initial_replicas", "scale", "initial", "initial", _whole(0, MAX_REPLICAS), 1, "replicas started by a deploy"),
    Field("park_after_s", "scale", "park", "park", _duration(), 60.0, "idle time until a replica is parked; 0: never"),
    Field("idle_s", "scale", "idle", "idle", _or("auto", _duration()), None, "idle time until a replica is stopped; auto: learned from the function's own gaps and wakes; 0: never"),
    Field("idle_max_s", "scale", "idle_max", "idle-max", _duration(1.0), 3600.0, "the longest that it is kept where `idle` is auto"),
    Field("cold_price", "scale", "cold_price", "cold-price", _from_to(0.0, 10_000.0, "a number"), 10.0, "how many seconds of a held GPU one second of a caller's waiting is worth, where `idle` is auto; 10: an hour of a person costs ten times that of a GPU"),
    Field("in_flight", "scale", "in_flight", "in-flight", _whole(1, 1000), 0, "requests a replica handles at once; default: 1 with a GPU, 8 without"),
    Field("queue", "scale", "queue", "queue", _whole(0, 100_000), 1000, "requests that may wait for a replica; more get 503"),
    Field("start_timeout_s", "limits", "start_timeout", "start-timeout", _duration(1.0), 300.0, "a start that takes longer has failed"),
    Field("exec_timeout_s", "limits", "exec_timeout", "exec-timeout", _duration(), 60.0, "one request; 0: no limit"),
    Field("body_limit_bytes", "limits", "body", "body", _size(), 16 * 2**20, "larger request bodies get 413"),
    Field("process_snapshot", "snapshot", "process", "snapshot", _choice("auto", "on", "off"), "auto", "process snapshots; auto: where `load` is defined"),
    Field("weight_snapshot", "snapshot", "weights", "weights", _choice("auto", "on", "off"), "auto", "weight snapshots; auto: where `build` is defined"),
    Field("snapshot_env", "snapshot", "env", "snapshot-env", _words(), (), "variables that `load` needs; the snapshot holds their values"),
    Field("weights_source", "weights", "source", "weights-source", _text(), "", "weights that the image brings: ./PATH, hf://ORG/NAME@REVISION, oci://REGISTRY/REPOSITORY@sha256:…, https://…; empty: none", is_built_in=True),
    Field("weights_digest", "weights", "digest", "weights-digest", _text(), "", "sha256:… of what the source gives; a must for https://", is_built_in=True),
    Field("weights_include", "weights", "include", "weights-include", _words(), (), "which files of the source, as patterns; empty: the checkpoint and the small files beside it", is_built_in=True),
    Field("weights_dtype", "weights", "dtype", "weights-dtype", _choice("keep", "float32", "float16", "bfloat16"), "keep", "what a GGUF file becomes: kept as it is, or dequantised to this type", is_built_in=True),
    Field("price_class", "price", "class", "price-class", _text(), "standard", "row of the price plan that bills this function"),
    Field("budget_gpu_s", "price", "budget", "budget", _gpu_seconds(), 0.0, "GPU-seconds that it may hold in a UTC day, then it wakes no more; 0: no bound"),
    Field("tenant", "function", "tenant", "tenant", _text(), "default", "whose function this is: bills and snapshots are kept apart"),
)  # fmt: skip

_BY_ANNOTATION = {f"{DOMAIN}/{item.annotation}": item for item in FIELDS}
_BY_FILE_KEY = {(item.table, item.key): item for item in FIELDS}


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A validated request. Units are in the names; each attribute's meaning is in `FIELDS`."""

    gpus: float
    gpu_models: tuple[str, ...]
    gpu_memory_bytes: int
    mig_profile: str
    compute_capability: tuple[int, int] | None
    """``(8, 0)`` of 8.0; None: any."""
    spot: str
    min_replicas: int
    max_replicas: int
    initial_replicas: int
    park_after_s: float
    idle_s: float | None
    """None: learned, see `adapter.policy.keep_alive`."""
    idle_max_s: float
    cold_price: float
    in_flight: int
    queue: int
    start_timeout_s: float
    exec_timeout_s: float
    body_limit_bytes: int
    process_snapshot: str
    weight_snapshot: str
    snapshot_env: tuple[str, ...]
    weights_source: str
    weights_digest: str
    weights_include: tuple[str, ...]
    weights_dtype: str
    price_class: str
    budget_gpu_s: float
    tenant: str


def parse_spec(file: Mapping[str, Any], annotations: Mapping[str, str], *, source: str = CONFIG_FILE) -> FunctionSpec:
    """A spec from the file's tables and the deployment's annotations; the annotations win.

    Annotations of other domains are nobody's business here. Raises `ConfigError` naming the key,
    the value, the accepted form and, for an unknown key, the nearest known one.
    """
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    for table, entries in file.items():
        if not isinstance(entries, Mapping):
            raise _unknown(f"{table}", source, sorted({f"[{item.table}]" for item in FIELDS}))
        for key, value in entries.items():
            known = _BY_FILE_KEY.get((table, key))
            if known is None:
                raise _unknown(f"{table}.{key}", source, [f"{t}.{k}" for t, k in _BY_FILE_KEY])
            written[known.name] = f"{source}: {table}.{key}"
            values[known.name] = _value(known, value, written[known.name])
    for name, text in annotations.items():
        if not name.startswith(DOMAIN + "/"):
            continue
        known = _BY_ANNOTATION.get(name)
        if known is None:
            raise _unknown(name, "annotations", [n for n, item in _BY_ANNOTATION.items() if not item.is_built_in])
        if known.is_built_in:
            raise ConfigError(
                f"{name} cannot be an annotation.",
                why="It says what is built into the image, which a deployment cannot change.",
                hint=f"Write {known.key} under [{known.table}] in {source}, and build the image anew.",
                code="built-in",
            )
        written[known.name] = f"annotation {name}"
        values[known.name] = _value(known, text, written[known.name])
    return _checked({**{item.name: item.default for item in FIELDS}, **values}, written)


def _value(item: Field, value: Any, where: str) -> Any:
    try:
        return item.form(value)
    except ValueError as exc:
        raise ConfigError(
            f"{where} = {value!r} cannot be used.",
            why=f"It sets: {item.doc}.",
            hint=f"Write {exc}.",
            code="bad-value",
        ) from exc


def _unknown(name: str, where: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return ConfigError(
        f"Unknown key {name} in {where}.",
        why="A key that is not known would silently do nothing.",
        hint=f"Did you mean {near[0]}?" if near else "Known keys: " + ", ".join(known) + ".",
        code="unknown-key",
    )


def asked_in(annotations: Mapping[str, str]) -> frozenset[str]:
    """The attributes of `FunctionSpec` that annotations set."""
    return frozenset(item.name for name, item in _BY_ANNOTATION.items() if name in annotations)


def _checked(values: dict[str, Any], written: Mapping[str, str]) -> FunctionSpec:
    """`written`: where each value that is not a default was found, by attribute."""
    if values["min_replicas"] > values["max_replicas"]:
        least, most = (_where(name, written) for name in ("min_replicas", "max_replicas"))
        raise ConfigError(
            f"{least} = {values['min_replicas']} is above {most} = {values['max_replicas']}.",
            why="The least cannot exceed the most.",
            hint="Raise scale.max (gpufn.dev/max) or lower scale.min (gpufn.dev/min).",
            code="bad-value",
        )
    if values["mig_profile"]:
        values["gpus"] = values["gpus"] if "gpus" in written else 1.0
        _check_slices(values, written)
    values["initial_replicas"] = min(values["initial_replicas"], values["max_replicas"])
    values["in_flight"] = values["in_flight"] or (1 if values["gpus"] else 8)
    return FunctionSpec(**values)


def _where(name: str, written: Mapping[str, str]) -> str:
    """A value's key as whoever wrote it knows it."""
    item = next(item for item in FIELDS if item.name == name)
    return written.get(name) or f"the default of {item.table}.{item.key}"


def _check_slices(values: Mapping[str, Any], written: Mapping[str, str]) -> None:
    """Of a function that asks for a MIG profile."""
    profile, count, memory_bytes = values["mig_profile"], values["gpus"], values["gpu_memory_bytes"]
    if count != int(count):
        raise ConfigError(
            f"{_where('gpus', written)} = {count:g} and {_where('mig_profile', written)} = {profile} contradict each other.",
            why="A share is of a whole GPU; a MIG slice is one already, and cannot be shared.",
            hint="Leave gpu.count (gpufn.dev/gpu) out, or make it the number of slices.",
            code="contradiction",
        )
    match = _MIG_PROFILE.fullmatch(profile)
    assert match is not None
    if memory_bytes > int(match[1]) * 2**30:
        memory, mig = (_where(name, written) for name in ("gpu_memory_bytes", "mig_profile"))
        raise ConfigError(
            f"{memory} = {format_size(memory_bytes)} and {mig} = {profile} contradict each other.",
            why=f"A slice of this profile has {match[1]} GB.",
            hint="Ask for a larger profile, or leave gpu.memory (gpufn.dev/memory) out.",
            code="contradiction",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The tables of a function folder's `gpufn.toml`; empty where there is none. Raises `ConfigError`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    path = folder / CONFIG_FILE
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would wait for ever
            raise ConfigError(f"{path} is no file.", hint="Remove it, or write TOML into a file.", code="bad-file")
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return data
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read.", why=f"{exc.strerror}.", code="bad-file") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(
            f"{path} is not valid TOML.", why=f"{exc}.", hint="Mend the line it names.", code="bad-file"
        ) from exc


@dataclass(frozen=True, slots=True)
class HandlerShape:
    """What a handler's source defines, read without running it."""

    has_load: bool
    has_build: bool
    """`build(device)`: the model without its weights, which a weight snapshot then fills."""
    handle_arguments: int
    """1: Flask-style ``handle(request)``; 2: OpenFaaS-style ``handle(event, context)``."""


def read_handler_shape(folder: Path) -> HandlerShape:
    """Raises `HandlerError` where there is no handler, it does not parse, or it has no `handle`."""
    path = folder / HANDLER_FILE
    tree = _parse_handler(path)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if "handle" not in functions and "handle" not in imported | assigned:
        raise HandlerError(
            f"{path} defines no `handle`.",
            why=f"It defines: {', '.join(sorted(functions)) or 'no function'}.",
            hint="Write: def handle(event, context): ...",
            code="handler-missing",
        )
    arguments = functions["handle"].args if "handle" in functions else None
    count = 2 if arguments is None or arguments.vararg else len(arguments.posonlyargs + arguments.args)
    defined = functions.keys() | imported | assigned
    return HandlerShape("load" in defined, "build" in defined, 1 if count == 1 else 2)


def _parse_handler(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except FileNotFoundError as exc:
        raise HandlerError(
            f"{path.parent} is no function folder.",
            why=f"It has no {HANDLER_FILE}.",
            hint="Start one with: gpufn init NAME",
            code="handler-missing",
        ) from exc
    except OSError as exc:
        raise HandlerError(f"{path} cannot be read.", why=f"{exc.strerror}.", code="handler-missing") from exc
    except (SyntaxError, ValueError) as exc:
        raise HandlerError(
            f"{path} does not parse.", why=f"{exc}.", hint="Mend the line it names.", code="handler-syntax"
        ) from exc
    except (RecursionError, MemoryError) as exc:  # how CPython's parser says it
        raise HandlerError(f"{path} does not parse.", why="It is nested too deeply.", code="handler-syntax") from exc
