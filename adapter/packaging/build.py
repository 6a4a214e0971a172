"""One build: from an application folder to layers, apart by how often they change, and what the image starts.

    packages      what the requirements ask for            changes with them
    shim, criu    what gpufn brings                        changes with gpufn
    environment   variables of the image's processes
    weights       the weight snapshot                      changes with its source
    (application) the folder itself                        changes with every edit

Everything that can be refused is refused before anything is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import adapter
from adapter.errors import ConfigError
from adapter.keys import CONTRACT_VERSION, MODEL_DIR
from adapter.packaging import application, packages, sbom, shim
from adapter.packaging.function import Function, function_folder, read_function
from adapter.packaging.layers import Layers, Outcome, to_toml
from adapter.packaging.requirements import read_requirements
from adapter.packaging.settings import BuildSettings
from adapter.packaging.sources import WeightsConfig, fetch_weights, source_identity
from adapter.packaging.weights_tools import tools_for
from adapter.units import format_size

PACKAGES, SHIM, CRIU, ENVIRONMENT, WEIGHTS, PIP_CACHE = (
    "packages",
    "shim",
    "criu",
    "environment",
    "weights",
    "pip-cache",
)
LABELS = "dev.gpufn"
TOKEN_TYPES = ("huggingface",)
"""Types of bindings whose file `token` opens a weights source."""


_CHECKPOINTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Places:
    """Where a build reads and writes: folders that the lifecycle names."""

    app: Path
    layers: Path
    buildpack: Path
    platform: Path


def build(places: Places, environ: Mapping[str, str], say: Say) -> list[Outcome]:
    """Write the layers, `launch.toml` and the bills of materials. Raises `AdapterError`; no half layer is left then."""
    settings = BuildSettings.from_env(environ)
    function = _function(places.app)
    ignore = application.read_ignore(places.app)
    for _ in application.entries(places.app, ignore):
        pass  # raises for what no image can hold
    wanted = _wanted(places, settings, function)
    brought = places.buildpack / CRIU if (places.buildpack / CRIU / "criu").exists() else None
    brings_criu = shim.brings_criu(settings, brought, environ)
    layers = Layers(places.layers)
    weights = WeightsConfig.of(function.spec)
    identity = {"identity": source_identity(weights, function.folder)} if weights else {}

    makes_weights = weights is not None and not layers.is_current(WEIGHTS, identity)
    _packages(layers, places, settings, wanted, environ, say, contents=makes_weights)
    _shim(layers, environ, say)
    if brings_criu and brought:
        _criu(layers, brought, say)
    else:
        layers.drop(CRIU)
    _environment(layers, function.folder, environ, say)
    if weights:
        _weights(layers, weights, identity, function.folder, places, say, wanted=wanted, environ=environ)
    else:
        layers.drop(WEIGHTS)
    _application(places, function, ignore, weights, environ, say)
    _launch(places.layers, layers[PACKAGES], function)
    return layers.outcomes


def _function(app: Path) -> Function:
    folder = function_folder(app)
    if folder is None:
        raise ConfigError(
            "There is no function in this folder.",
            why="It has no handler.py, nor have its folders function/ and fn/.",
            hint="Start one with: gpufn init NAME",
            code="handler-missing",
        )
    return read_function(folder)


def _wanted(places: Places, settings: BuildSettings, function: Function) -> packages.Wanted:
    requirements = read_requirements(function.folder, places.app)
    own = _own_wheels(places.app, settings)
    bundled = places.buildpack / application.WHEELS_FOLDER
    folders = dict.fromkeys(folder for folder in (own, bundled if bundled.is_dir() else None) if folder)
    return packages.Wanted(
        requirements=requirements,
        shim=packages.shim_requirements(gpus=function.spec.gpus),
        from_base=settings.from_base,
        wheels=tuple(folders),
        is_offline=own is not None or (bool(folders) and not requirements.lines and not requirements.without_deps),
    )


def _own_wheels(app: Path, settings: BuildSettings) -> Path | None:
    if not settings.wheels:
        folder = app / application.WHEELS_FOLDER
        return folder if folder.is_dir() and any(folder.glob("*.whl")) else None
    folder = app / settings.wheels  # an absolute path stays what it is
    if not folder.is_dir():
        raise ConfigError(
            f"BP_GPUFN_WHEELS={settings.wheels} is no folder of the build container.",
            why="Packages would come from there.",
            hint="Put it into the function folder, or mount it: pack build --volume, gpufn build --wheels.",
            code="bad-setting",
        )
    return folder


def _packages(
    layers: Layers,
    places: Places,
    settings: BuildSettings,
    wanted: packages.Wanted,
    environ: Mapping[str, str],
    say: Say,
    *,
    contents: bool,
) -> None:
    """`contents`: the layer must be there to be run, for the weights."""
    made_from = packages.made_from(wanted)
    uses_cache = settings.pip_cache == "on" and not wanted.is_offline
    cache = layers.keep_cache(PIP_CACHE) if uses_cache else None
    if not uses_cache:
        layers.drop(PIP_CACHE)
    if layers.is_current(PACKAGES, made_from) and not contents:
        layers.reuse(PACKAGES)
    else:
        say(f"{PACKAGES}: installing with pip, {_from(wanted)}")
        with layers.making(PACKAGES, made_from) as layer:
            packages.make_environment(layer.folder, wanted, cache, environ, places.app)
            count = len(packages.installed(layer.folder))
            layer.what = f"{count} Python package{'' if count == 1 else 's'}"
        _sbom(layers, PACKAGES, sbom.python_packages(layers[PACKAGES]))
    _report(layers, say)


def _from(wanted: packages.Wanted) -> str:
    if wanted.is_offline:
        return f"from {' and '.join(str(folder) for folder in wanted.wheels)}, no index"
    return "from the index" + (" and wheels" if wanted.wheels else "")


def _shim(layers: Layers, environ: Mapping[str, str], say: Say) -> None:
    made_from = shim.shim_made_from()
    if layers.is_current(SHIM, made_from):
        layers.reuse(SHIM)
    else:
        with layers.making(SHIM, made_from) as layer:
            shim.make_shim(layer, environ)
        own = sbom.component("library", "gpufn", adapter.__version__, licence="Apache-2.0")
        _sbom(layers, SHIM, [own])
    _report(layers, say)


def _criu(layers: Layers, brought: Path, say: Say) -> None:
    made_from = shim.criu_made_from(brought)
    if layers.is_current(CRIU, made_from):
        layers.reuse(CRIU)
    else:
        with layers.making(CRIU, made_from) as layer:
            shim.make_criu(layer, brought)
        _sbom(
            layers,
            CRIU,
            [sbom.component("application", "criu", shim.criu_version(layers[CRIU]), licence="GPL-2.0-only")],
        )
    _report(layers, say)


def _environment(layers: Layers, folder: Path, environ: Mapping[str, str], say: Say) -> None:
    made_from = shim.environment_made_from(folder, environ)
    if layers.is_current(ENVIRONMENT, made_from):
        layers.reuse(ENVIRONMENT)
    else:
        with layers.making(ENVIRONMENT, made_from) as layer:
            shim.make_environment_layer(layer, folder, environ)
    _report(layers, say)


def _weights(
    layers: Layers,
    config: WeightsConfig,
    made_from: Mapping[str, str],
    folder: Path,
    places: Places,
    say: Say,
    *,
    wanted: packages.Wanted,
    environ: Mapping[str, str],
) -> None:
    if layers.is_current(WEIGHTS, made_from):
        layers.reuse(WEIGHTS)
        _report(layers, say)
        return
    say(f"{WEIGHTS}: from {config.source}")
    home = layers[PACKAGES]

    def install(target: Path, requirement: str) -> None:
        say(f"{WEIGHTS}: installing {requirement} to fetch them, for this build only")
        packages.install_apart(target, requirement, home, wanted, environ, places.app)

    with tools_for(config.source, install), layers.making(WEIGHTS, made_from) as layer:
        fetched = fetch_weights(
            config,
            folder,
            layer.folder,
            token_file=_token_file(places.platform),
            python=str(home / "bin" / "python"),
            identity=made_from["identity"],
        )
        layer.set_env("GPUFN_WEIGHTS", str(layer.folder))
        layer.set_env(MODEL_DIR, str(layer.folder / "model"))
        layer.what = f"{fetched.tensors} tensors" if fetched.has_snapshot else "files of a model"
        layer.metadata["source"] = fetched.source
    if fetched.note:
        say(f"{WEIGHTS}: {fetched.note}")
    _report(layers, say)


def _token_file(platform: Path) -> Path | None:
    """The token of a binding, which is in the build container only."""
    for binding in sorted((platform / "bindings").glob("*/type")):
        token = binding.with_name("token")
        if token.is_file() and binding.read_text(encoding="utf-8").strip().lower() in TOKEN_TYPES:
            return token
    return None


def _application(
    places: Places,
    function: Function,
    ignore: application.Ignore,
    weights: WeightsConfig | None,
    environ: Mapping[str, str],
    say: Say,
) -> None:
    removed = application.remove_ignored(places.app, ignore)
    if weights and weights.source.startswith("./"):
        application.remove_paths(places.app, list(_checkpoints(function.folder / weights.source)))
    packages.compile_all(function.folder, packages.system_python(), environ, "--checked")
    out = f", without {', '.join(removed[:6])}{' …' if len(removed) > 6 else ''}" if removed else ""
    say(f"application: {function.folder}{out}")


def _checkpoints(path: Path) -> Iterator[Path]:
    """What became the weights layer, and is not shipped twice."""
    files = [path] if path.is_file() else path.rglob("*")
    yield from (file for file in files if file.suffix in _CHECKPOINTS)


def _launch(root: Path, home: Path, function: Function) -> None:
    process = {
        "type": "web",
        "command": [str(home / "bin" / "python"), "-m", "adapter.runtime"],
        "default": True,
    }
    labels = {
        "contract": str(CONTRACT_VERSION),
        "gpu": f"{function.spec.gpus:g}",
        "gpu-memory": str(function.spec.gpu_memory_bytes),
        "config": function.config_json,
    }
    entries = [{"key": f"{LABELS}.{name}", "value": value} for name, value in labels.items()]
    (root / "launch.toml").write_text(to_toml({"processes": [process], "labels": entries}), encoding="utf-8")


def _sbom(layers: Layers, name: str, components: list[dict[str, object]]) -> None:
    layers.root.joinpath(f"{name}.sbom.cdx.json").write_text(sbom.sbom(components), encoding="utf-8")


def _report(layers: Layers, say: Say) -> None:
    outcome = layers.outcomes[-1]
    state = "reused" if outcome.is_reused else "new"
    why = f" ({', '.join(outcome.changed)} changed)" if outcome.changed else ""
    say(f"{outcome.name}: {state}, {outcome.what}, {format_size(outcome.size_bytes)}{why}")
