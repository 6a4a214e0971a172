"""Weights that an image brings: from where `[weights]` says to what a replica finds under `GPUFN_WEIGHTS`.

    <target>/weights.safetensors, weights.json    the weight snapshot: see `adapter.snapshot.weightsfile`
    <target>/model/                               what `MODEL_DIR` names: configuration, tokenizer …
    <target>/model/model.safetensors              a link to the snapshot: any safetensors reader opens it

What no snapshot can be made of (GGUF that is kept, a pipeline of several models) lies in ``model/`` as it came.
Runs where no GPU, no torch and no registry may be; what needs torch runs with the function's own interpreter.
The same input gives the same bytes and times. Checkpoints are input by strangers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from adapter.errors import ConfigError
from adapter.keys import CONFIG_FILE
from adapter.packaging import weights_layer
from adapter.packaging.weights_download import is_loopback
from adapter.packaging.weights_folder import FolderSource, digest_of
from adapter.packaging.weights_source import Progress, Source, disk_error, silent
from adapter.replica import shim_path
from adapter.spec import FunctionSpec

LAYOUT = 1
"""Of the folder that is written: another number, and layers of before are made anew."""

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_HUB = re.compile(r"hf://((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?")
_OCI = re.compile(r"oci://([a-z0-9.-]+(?::\d+)?)/([a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(?:@(sha256:[0-9a-f]{64}))?")
_BRANCHES = frozenset({"main", "master", "HEAD"})
_FORMS = "./PATH, hf://ORG/NAME@REVISION, oci://REGISTRY/REPOSITORY@sha256:…, or https://… with digest"


@dataclass(frozen=True, slots=True)
class WeightsConfig:
    """The table `[weights]`: see `adapter.spec.FIELDS`."""

    source: str
    digest: str = ""
    include: tuple[str, ...] = ()
    dtype: str = "keep"

    @classmethod
    def of(cls, spec: FunctionSpec) -> WeightsConfig | None:
        """None: the function brings no weights. Raises `ConfigError` where it says how, but not which."""
        config = cls(spec.weights_source, spec.weights_digest, spec.weights_include, spec.weights_dtype)
        if config == cls(""):
            return None
        _check(config)
        return config


@dataclass(frozen=True, slots=True)
class FetchedWeights:
    """What lies in `folder`. `source` names it exactly (a tag's commit), `note` says what a user should know."""

    folder: Path
    identity: str
    source: str
    has_snapshot: bool
    tensors: int
    size_bytes: int
    left_out: tuple[str, ...]
    """Files of the source and tensors of the checkpoint that are not in the image."""
    note: str


def source_identity(config: WeightsConfig, function_folder: Path) -> str:
    """``sha256:…`` of what `fetch_weights` would write, without fetching: equal means that the layer can stay.

    Of a folder the contents count, of what is remote its revision or digest. A tag counts as its name: who moves
    one sees the layer stay. Raises `AdapterError`.
    """
    _check(config)
    lines = [f"layout {LAYOUT}", json.dumps(asdict(config), sort_keys=True)]
    if config.source.startswith("./"):
        source = FolderSource(function_folder, config.source, config.digest)
        entries = weights_layer.included(source.entries(), config.include)
        lines += [f"{entry.name} {digest_of(source.fetch(entry, function_folder, silent))}" for entry in entries]
    if config.dtype != "keep":  # the names of the tensors are those of the handler's `build`
        code = (path for path in sorted(function_folder.rglob("*.py")) if path.is_file())
        lines += [f"{path.relative_to(function_folder)} {digest_of(path)}" for path in code]
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def fetch_weights(
    config: WeightsConfig,
    function_folder: Path,
    target: Path,
    *,
    token_file: Path | None = None,
    python: str = sys.executable,
    environ: Mapping[str, str] | None = None,
    shim: Path | None = None,
    identity: str = "",
    progress: Progress = silent,
) -> FetchedWeights:
    """Write the weights into the folder `target`, whole or not at all; what was there is replaced.

    `token_file` holds the hub's token, a build secret: it is read, sent to the hub, and is in no error and no file.
    `python` is the interpreter with the function's packages, and `environ` what it needs (``PYTHONPATH``): PyTorch
    files and GGUF are converted with it, by the package `adapter` in the folder `shim` (default: this one).
    `identity` is `source_identity`, from a caller who has it: a folder's files are then not read for it once more.
    Raises `AdapterError`: nothing new is in `target` then.
    """
    identity = identity or source_identity(config, function_folder)
    source = source_of(config, function_folder, token_file=token_file)
    _sweep(target)
    draft = target.with_name(f".{target.name}.draft-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        tools = weights_layer.Tools(function_folder, python, dict(environ or {}), shim or Path(shim_path()))
        made = weights_layer.make(source, config.include, config.dtype, draft, tools, progress, identity=identity)
        _publish(made.folder, target, draft)
    except OSError as exc:
        raise disk_error(exc, "the weights") from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return FetchedWeights(
        folder=target,
        identity=identity,
        source=source.pinned,
        has_snapshot=made.has_snapshot,
        tensors=made.tensors,
        size_bytes=made.size_bytes,
        left_out=made.left_out,
        note=made.note,
    )


def source_of(config: WeightsConfig, function_folder: Path, *, token_file: Path | None = None) -> Source:
    """The source that `config` names. Raises `ConfigError`, or `AdapterError` where its token cannot be read."""
    _check(config)
    if config.source.startswith("./"):
        return FolderSource(function_folder, config.source, config.digest)
    if hub := _HUB.fullmatch(config.source):
        from adapter.packaging.weights_hub import HubSource

        return HubSource(hub[1], hub[2], _token(token_file))
    if oci := _OCI.fullmatch(config.source):
        from adapter.packaging.weights_oci import ArtifactSource

        return ArtifactSource(oci[1], oci[2], oci[3])
    from adapter.packaging.weights_url import UrlSource

    return UrlSource(config.source, config.digest)


def _check(config: WeightsConfig) -> None:
    """Raises `ConfigError` for a source that is of no form, or that does not say exactly what it is."""
    where, source = f"{CONFIG_FILE}: weights", config.source
    hub, oci = _HUB.fullmatch(source), _OCI.fullmatch(source)
    if source.startswith("./") and len(source) > len("./"):
        wants_digest = bool(config.digest)
    elif hub:
        if not hub[2] or hub[2] in _BRANCHES:
            raise ConfigError(
                f"{where}.source = {source!r} says no fixed revision.",
                why="A build must give the same image tomorrow; a branch moves.",
                hint="Name a commit or a tag: hf://ORG/NAME@COMMIT",
                code="weights-source",
            )
        wants_digest = False
    elif oci:
        if not oci[3]:
            raise ConfigError(
                f"{where}.source = {source!r} has no digest.",
                why="A build must give the same image tomorrow; a tag moves.",
                hint="Name the manifest's: oci://REGISTRY/REPOSITORY@sha256:…",
                code="weights-source",
            )
        wants_digest = False
    elif _is_url(source):
        _check_url(where, source)
        wants_digest = True
    else:
        raise ConfigError(
            f"{where}.source = {source!r} is no source of weights.",
            why="Its form is not known." if source else "Other keys of [weights] are set, but not the source.",
            hint=f"Write {_FORMS}.",
            code="weights-source",
        )
    if wants_digest and not _SHA256.fullmatch(config.digest):
        raise ConfigError(
            f"{where}.digest = {config.digest!r} cannot be used.",
            why="What a URL gives may change: only its digest says that it is the same.",
            hint="Write sha256: and 64 hex digits; see: sha256sum FILE",
            code="weights-digest-form",
        )
    if config.digest and not wants_digest:
        raise ConfigError(
            f"{where}.digest is of no use here.",
            why=f"{source} says itself what it is.",
            hint="Remove the digest.",
            code="weights-digest-form",
        )


def _check_url(where: str, source: str) -> None:
    parts = urlsplit(source)
    if parts.username or parts.password:
        raise ConfigError(
            f"{where}.source has a user or a password in its URL.",
            why=f"{CONFIG_FILE} lies in the image, for all to read.",
            hint="Use a URL that needs none, or a registry (oci://), which has logins.",
            code="weights-source",
        )
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ConfigError(
            f"{where}.source = {source!r} is not encrypted.",
            why="http:// is for this machine only.",
            hint="Write https://",
            code="weights-source",
        )


def _is_url(source: str) -> bool:
    """Whether it is an http or https URL with a host."""
    try:
        parts = urlsplit(source)
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


def _token(path: Path | None) -> str:
    """The build secret in `path`; empty where there is none. Its error shows the path only."""
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"The token in {path} cannot be read.",
            why=f"{getattr(exc, 'strerror', None) or 'It is no text'}.",
            hint="Give the build a secret file with the token alone.",
            code="weights-token",
        ) from None


def _sweep(target: Path) -> None:
    """What a build left that was killed: one builder at a time has this folder."""
    for path in target.parent.glob(f".{target.name}.draft-*"):
        shutil.rmtree(path, ignore_errors=True)


def _publish(folder: Path, target: Path, draft: Path) -> None:
    if os.path.lexists(target):
        os.rename(target, draft / "replaced")
    try:
        os.rename(folder, target)
    except OSError:
        if os.path.lexists(draft / "replaced"):
            os.rename(draft / "replaced", target)
        raise


__all__ = ["FetchedWeights", "WeightsConfig", "fetch_weights", "source_identity"]
