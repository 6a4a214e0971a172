"""What of a source goes into the image, and how: which file is the checkpoint, what lies beside it, what stays out."""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapter.errors import ConfigError, SnapshotError
from adapter.keys import MODEL_DIR
from adapter.packaging.weights_source import Entry, Progress, Source, checked, disk_error, is_safe, unsafe
from adapter.snapshot.convert import convert
from adapter.snapshot.image_weights import MODEL_FOLDER, SOURCE
from adapter.snapshot.weightsfile import DATA

MODEL_LINK = "model.safetensors"
FIXED_TIME = 315_532_801
"""Time of every file: one second into 1980, as other builders of images have it."""

_INDEXED = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What a model hub's folder is read from: the first that is there."""

_PICKLED = (".bin", ".pt", ".pth")
_RUNS_CODE = (".pkl", ".pickle", ".joblib", ".ckpt", ".dill", ".npy", ".npz", ".h5", ".keras", ".mar")
_BESIDE = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".spm", ".yaml", ".yml", ".toml")
"""Configuration and tokenizers. No `.py`: code of a stranger is no weights."""
_BESIDE_NAMES = frozenset({"LICENSE", "NOTICE", "COPYING"})
_INDEX_LIMIT_BYTES = 2**26
_CONVERT_LIMIT_S = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Names of a source's files. `checkpoint` becomes the snapshot (None: no snapshot), `beside` lies in ``model/``."""

    checkpoint: str | None
    beside: tuple[str, ...]
    left_out: tuple[str, ...]
    note: str = ""

    @property
    def is_index(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.endswith(".json")


@dataclass(frozen=True, slots=True)
class Tools:
    """What conversions run with: the function's interpreter, and what of the environment it needs."""

    function_folder: Path
    python: str
    environ: Mapping[str, str]
    shim: Path
    """A folder with the package `adapter` and nothing that could stand before the function's packages."""


@dataclass(frozen=True, slots=True)
class Made:
    folder: Path
    has_snapshot: bool
    tensors: int
    size_bytes: int
    left_out: tuple[str, ...]
    note: str


def included(entries: Iterable[Entry], patterns: Sequence[str]) -> list[Entry]:
    """Those that a pattern names; without patterns, all."""
    return [e for e in entries if not patterns or any(fnmatch.fnmatchcase(e.name, pattern) for pattern in patterns)]


def choose(names: Sequence[str], *, dtype: str, asked: bool = False) -> Choice:
    """What each file of a source is for. `asked`: `include` names them, so that all of them are wanted.

    Raises `SnapshotError`: there are no weights, several, or only such as run code when they are read.
    """
    top = [name for name in names if "/" not in name]
    has_tensors = any(name.endswith(".safetensors") for name in top)  # then pickles are the same once more
    indexed = [name for name in _INDEXED if name in top and not (has_tensors and name.startswith("pytorch_"))]
    checkpoint = indexed[0] if indexed else _only_one(top, dtype)
    several = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if checkpoint is None and not several:
        raise _no_weights(names)
    note = ""
    if checkpoint is None:
        kept = set(several)
        kind = "GGUF is kept as it is" if all(name.endswith(".gguf") for name in kept) else "There are several models"
        note = f"{kind}: the files lie in {MODEL_FOLDER}/, and a replica starts by its `load`."
    else:
        kept = {name for name in several if "/" in name}
    beside = tuple(n for n in names if n in kept or (n != checkpoint and _goes_beside(n, asked=asked)))
    return Choice(checkpoint, beside, tuple(n for n in names if n != checkpoint and n not in beside), note)


def _only_one(top: Sequence[str], dtype: str) -> str | None:
    """The file that is the checkpoint for being the only one of its kind; None: there is none, or it stays as it is."""
    tensors = [name for name in top if name.endswith(".safetensors")]
    blocks = [name for name in top if name.endswith(".gguf")]
    found = tensors or blocks or [name for name in top if name.endswith(_PICKLED)]
    is_kept = not tensors and bool(blocks) and dtype == "keep"
    return found[0] if len(found) == 1 and not is_kept else None


def _goes_beside(name: str, *, asked: bool) -> bool:
    path = PurePosixPath(name)
    if path.suffix in _PICKLED or path.suffix in _RUNS_CODE or path.suffix in {".safetensors", ".gguf", ".py"}:
        return False
    if name.endswith(".index.json"):
        return False
    return asked or path.suffix in _BESIDE or path.stem in _BESIDE_NAMES


def _no_weights(names: Sequence[str]) -> SnapshotError:
    code = [name for name in names if name.endswith(_RUNS_CODE)]
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if code:
        return unsafe(
            code[0],
            "To read it, code that it holds would have to run.",
            "Save the tensors alone, as safetensors: safetensors.torch.save_file(model.state_dict(), …)",
        )
    why = f"It has several: {', '.join(pickled[:3])}." if pickled else f"Its files: {', '.join(names[:5]) or 'none'}."
    return SnapshotError(
        "It is not clear which file the weights are." if pickled else "The source holds no weights.",
        why=why,
        hint='Name it: include = ["FILE", …] under [weights]; known are safetensors, GGUF, PyTorch\'s .bin and .pt.',
        code="weights-missing",
    )


def make(
    source: Source,
    patterns: Sequence[str],
    dtype: str,
    draft: Path,
    tools: Tools,
    progress: Progress,
    *,
    identity: str,
) -> Made:
    """Fetch and convert into a folder below `draft`, which is the caller's to remove. Raises `AdapterError`, `OSError`."""
    entries = {entry.name: entry for entry in checked(source.entries(), source.pinned)}
    strange = tuple(sorted(name for name in entries if not is_safe(name)))
    chosen = included((entry for name, entry in entries.items() if name not in strange), patterns)
    choice = choose([entry.name for entry in chosen], dtype=dtype, asked=bool(patterns))
    downloads, layer = draft / "download", draft / "layer"
    downloads.mkdir()
    model = layer / MODEL_FOLDER
    model.mkdir(parents=True)
    for name in choice.beside:
        _place(source.fetch(entries[name], downloads, progress), model / name, downloads)
    tensors, left_out = 0, {*choice.left_out, *strange}
    if choice.checkpoint is not None:
        path = source.fetch(entries[choice.checkpoint], downloads, progress)
        for shard in _shards(path) if choice.is_index else ():
            if shard not in entries:
                raise _missing_shard(choice.checkpoint, shard)
            source.fetch(entries[shard], downloads, progress)
            left_out.discard(shard)
        progress("convert", 0, 0)
        tensors, more = _convert(path, layer, dtype, tools)
        left_out |= more
        os.symlink(f"../{DATA}", model / MODEL_LINK)
    said = {"identity": identity, "source": source.pinned, "left_out": sorted(left_out)}
    (layer / SOURCE).write_text(json.dumps(said) + "\n")
    size = _settle(layer)
    return Made(layer, choice.checkpoint is not None, tensors, size, tuple(sorted(left_out)), choice.note)


def _place(path: Path, target: Path, downloads: Path) -> None:
    """What was downloaded moves, what is the user's is copied, links as what they lead to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if downloads in path.parents:
        os.rename(path, target)
    else:
        shutil.copyfile(path, target)


def _shards(index: Path) -> list[str]:
    """Files that the index of a checkpoint names; what it says is checked by the conversion."""
    try:
        if index.stat().st_size > _INDEX_LIMIT_BYTES:
            raise ValueError("it is too large")
        places = json.loads(index.read_bytes())["weight_map"].values()
        return sorted({str(place) for place in places})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise SnapshotError(
            f"{index.name} is no index of a sharded checkpoint.", why=f"{exc!r}.", code="bad-checkpoint"
        ) from exc


def _missing_shard(index: str, shard: str) -> SnapshotError:
    return SnapshotError(
        f"The weights {shard!r} are missing.",
        why=f"{index} names the file, and the source does not have it.",
        hint="Complete the source, or correct `include` under [weights].",
        code="weights-missing",
    )


# Conversion -----------------------------------------------------------------------------------------------------


def _convert(path: Path, layer: Path, dtype: str, tools: Tools) -> tuple[int, set[str]]:
    """Those of safetensors need the standard library only; for the others the function's interpreter has torch."""
    is_pickled = path.name.endswith((*_PICKLED, ".bin.index.json"))
    if not is_pickled and path.suffix != ".gguf":
        try:
            done = convert(path, layer)
        except SnapshotError as exc:
            cause = exc.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_error(cause, "the weights") from exc
            raise
        return done.tensors, set(done.left_out)
    command = [tools.python, "-m", "adapter.snapshot.convert", str(path), str(layer)]
    if path.suffix == ".gguf":
        names = layer.parent / "names.json"
        names.write_text(_ask([tools.python, "-m", "adapter.runtime.names", str(tools.function_folder)], layer, tools))
        command += ["--dtype", dtype, "--names", str(names)]
    result = json.loads(_ask(command, layer, tools))
    return int(result["tensors"]), set(result["left_out"])


def _ask(command: list[str], layer: Path, tools: Tools) -> str:
    """The last line that a command of ours prints, in the function's interpreter. Raises the error that it printed."""
    try:
        done = subprocess.run(
            command,
            env=_environment(layer, tools),
            capture_output=True,
            text=True,
            check=False,
            timeout=_CONVERT_LIMIT_S,
        )
    except subprocess.TimeoutExpired as exc:
        raise SnapshotError("The conversion of the weights did not end.", code="convert-failed") from exc
    except OSError as exc:
        raise ConfigError(
            f"The function's interpreter {command[0]} cannot run.", why=f"{exc.strerror}.", code="convert-failed"
        ) from exc
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0:
        return last
    try:
        error = json.loads(last)["error"]
        said = {name: str(error[name]) for name in ("why", "hint", "code")}
        raise SnapshotError(str(error["message"]), why=said["why"], hint=said["hint"], code=said["code"])
    except (ValueError, KeyError, TypeError):
        pass
    words = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and no word"])[-1]
    raise SnapshotError(
        "The weights cannot be converted.",
        why=f"{words}.",
        hint="PyTorch files need torch among the function's requirements, GGUF torch and gguf; safetensors need neither.",
        code="convert-failed",
    )


def _environment(layer: Path, tools: Tools) -> dict[str, str]:
    """Nothing of the builder's but what an interpreter needs: no token reaches a checkpoint's reader."""
    wanted = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
    environ = {name: os.environ[name] for name in wanted if name in os.environ}
    environ.update(tools.environ)
    path = [str(tools.shim), *filter(None, [tools.environ.get("PYTHONPATH")])]
    return {
        **environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        MODEL_DIR: str(layer / MODEL_FOLDER),
    }


def _settle(layer: Path) -> int:
    """Modes and times that say nothing about the build; returns the bytes of all files."""
    size = 0
    for folder, _, names in os.walk(layer, topdown=False):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                os.chmod(path, 0o644)
                size += os.path.getsize(path)
            os.utime(path, (FIXED_TIME, FIXED_TIME), follow_symlinks=False)
        os.chmod(folder, 0o755)  # noqa: S103  # a replica runs as another user
        os.utime(folder, (FIXED_TIME, FIXED_TIME))
    return size
