"""The layer `packages`: an environment with what the function and the shim require, and nothing that tells builds apart.

It sees what the base image brings (`--system-site-packages`), so that nothing is there twice; it has neither an
installer nor anything that only a build needs. pip does the work: it is what build images have.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapter.errors import AdapterError, ConfigError, Unavailable
from adapter.keys import REQUIREMENTS_FILE, SHIM_REQUIREMENTS
from adapter.packaging.requirements import Line, Requirements, normalised
from adapter.replica import shim_path

FORMAT = 1
"""Of what this module makes: another number, and layers of before are made anew."""

_LAST_WORDS = 6
"""Lines of an installer that an error repeats."""

_BASE = """
import importlib.metadata, json, sys
print(json.dumps({"base": sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions() if d.name})}))
"""
_IMPORT = """
import importlib, importlib.metadata, json, sys
name = sys.argv[1]
found = importlib.metadata.distribution(name)
tops = (found.read_text("top_level.txt") or "").split() or [name.replace("-", "_")]
importlib.import_module(name.replace("-", "_") if name.replace("-", "_") in tops else tops[0])
print(json.dumps({"version": found.version}))
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the layer is made from. `wheels`: folders that packages come from; `is_offline`: and from no index."""

    requirements: Requirements
    shim: tuple[str, ...]
    from_base: tuple[str, ...]
    wheels: tuple[Path, ...]
    is_offline: bool


def shim_requirements(*, gpus: float) -> tuple[str, ...]:
    """What an image's shim needs; with a GPU also what reads the driver."""
    toml = ('tomli>=2.0; python_version < "3.11"',)
    return (*SHIM_REQUIREMENTS, *toml, *(("nvidia-ml-py>=12.560",) if gpus else ()))


def made_from(wanted: Wanted) -> dict[str, str]:
    """What identifies the layer: equal means that it would come out equal."""
    return {
        "format": str(FORMAT),
        "python": f"{sys.version.split()[0]} {os.path.realpath(sys.executable)}",
        "base": _digest(_base_packages()),
        "requirements": wanted.requirements.digest,
        "shim": " ".join(wanted.shim),
        "from-base": " ".join(sorted(map(normalised, wanted.from_base))),
        "wheels": _digest(line for folder in wanted.wheels for line in wheels_in(folder)),
    }


def wheels_in(folder: Path) -> list[str]:
    """Name and digest of each file in a folder of wheels."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.is_file():
            whole = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    whole.update(chunk)
            lines.append(f"{path.name} {whole.hexdigest()}")
    return lines


def make_environment(home: Path, wanted: Wanted, cache: Path | None, environ: Mapping[str, str], cwd: Path) -> None:
    """Write the environment into the empty folder `home`, where it stays: its scripts name it.

    Raises `ConfigError` with the installer's own words, `Unavailable` where there is no installer or no index.
    """
    base = {normalised(name): _base_version(name) for name in wanted.from_base}
    pinned = [f"{name}=={version}" for name, version in base.items()]
    _venv(home, environ)
    vouched = [_vouch(home, name, version) for name, version in base.items()]
    with tempfile.TemporaryDirectory(prefix="gpufn-pip-") as work:
        pip = _Pip(home, Path(work), wanted, cache, environ, cwd)
        requirements = wanted.requirements.without(wanted.from_base)
        pip.constrain(pinned)
        shim = [Line("the shim", 0, text) for text in wanted.shim]
        if requirements.has_hashes:
            pip.install(requirements.lines)
            pip.constrain([*pinned, *(f"{name}=={version}" for name, version in installed(home))])
            pip.install(shim)
        else:
            pip.install([*shim, *requirements.lines])
        if requirements.without_deps:
            pip.install(requirements.without_deps, "--no-deps")
    for path in vouched:
        shutil.rmtree(path, ignore_errors=True)
    _refuse_doubles(home, base)
    _tidy(home)
    compile_all(home, home / "bin" / "python", environ)


def install_apart(
    folder: Path, requirement: str, home: Path, wanted: Wanted, environ: Mapping[str, str], cwd: Path
) -> None:
    """Put a package of the build's own into `folder`, from where those of the environment `home` come.

    Raises `ConfigError` with the installer's words, `Unavailable` where there is no installer.
    """
    with tempfile.TemporaryDirectory(prefix="gpufn-pip-") as work:
        pip = _Pip(home, Path(work), wanted, None, environ, cwd)
        pip.install([Line("the build", 0, requirement)], "--target", str(folder))


def installed(home: Path) -> list[tuple[str, str]]:
    """Name and version of each package in the environment itself, by name."""
    import importlib.metadata

    found = importlib.metadata.distributions(path=[str(path) for path in site_packages(home)])
    return sorted({(normalised(item.metadata["Name"]), item.version) for item in found})


def system_python() -> Path:
    """The interpreter that environments are made from."""
    return Path(sys.executable)


def site_packages(home: Path) -> list[Path]:
    return sorted(home.glob("lib/python3.*/site-packages"))


def compile_all(folder: Path, python: Path, environ: Mapping[str, str], *options: str) -> None:
    """Byte-code for all of `folder`, by the interpreter that will run it."""
    environment = {**_plain(environ), "PYTHONHASHSEED": "0", "PYTHONPATH": shim_path(), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), "-m", "adapter.packaging.bytecode", str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"{folder.name} cannot be compiled.", why=_last(done.stderr or done.stdout, 1), code="compile-failed"
        )


class _Pip:
    """Runs pip for the environment `home`: from wheels, or from an index with a cache."""

    def __init__(
        self, home: Path, work: Path, wanted: Wanted, cache: Path | None, environ: Mapping[str, str], cwd: Path
    ) -> None:
        self._wanted = wanted
        self._work = work
        self._cwd = cwd
        self._environ = {**_plain(environ), "SOURCE_DATE_EPOCH": "315532801", "PYTHONHASHSEED": "0"}
        sources = [word for folder in wanted.wheels for word in ("--find-links", str(folder))]
        sources += ["--no-index"] if wanted.is_offline else []
        kept = ["--cache-dir", str(cache)] if cache else ["--no-cache-dir"]
        plain = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        self._start = [*_installer(work, self._environ), "--python", str(home / "bin" / "python"), "install"]
        self._options = [*plain, "--no-compile", "--no-warn-script-location", *kept, *sources]
        self._constraints = work / "constraints.txt"
        self._constraints.touch()

    def constrain(self, lines: Iterable[str]) -> None:
        self._constraints.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def install(self, lines: Sequence[Line], *more: str) -> None:
        path = self._work / "requirements.txt"
        path.write_text("".join(f"{line.text}\n" for line in lines), encoding="utf-8")
        options = [*self._options, *more, "--constraint", str(self._constraints), "--requirement", str(path)]
        done = subprocess.run(
            [*self._start, *options],
            cwd=self._cwd,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise self._failure(f"{done.stdout}\n{done.stderr}", done.returncode, lines)

    def _failure(self, said: str, code: int, lines: Sequence[Line]) -> AdapterError:
        words = _masked(said).replace(str(self._work / "requirements.txt"), REQUIREMENTS_FILE)
        errors = [line for line in words.splitlines() if line.startswith("ERROR:")]
        if not self._wanted.is_offline and (unreachable := _unreachable(words, errors)):
            return Unavailable(
                "The index of packages cannot be reached.",
                why=unreachable,
                hint="For a CA of your own: gpufn build --ca FILE; for a mirror: -e PIP_INDEX_URL=URL; for another "
                "network: --network NAME; without any index: --wheels FOLDER",
                code="index-unreachable",
            )
        shown = _exception(words) if errors and errors[-1].startswith("ERROR: Exception:") else "\n".join(errors)
        shown = shown or words
        wheels = f"put what is missing into {self._wanted.wheels[0]}" if self._wanted.is_offline else ""
        advice = [word for word in (self._mend(shown, lines), wheels) if word]
        return ConfigError(
            "The requirements of the function cannot be installed.",
            why=_last(shown, _LAST_WORDS) or f"pip ended with code {code}.",
            hint=f"{advice[0][0].upper()}{', or '.join(advice)[1:]}.",
            code="requirements-failed",
        )

    def _mend(self, words: str, lines: Sequence[Line]) -> str:
        """What to mend: the line that the words are about; no file where they are about what gpufn itself asks for."""
        requirements = self._wanted.requirements
        theirs = (*requirements.lines, *requirements.without_deps)
        if line := requirements.line_of(words) or next((item for item in theirs if _marker(item) in words), None):
            return without_credentials(f"mend {line}")
        own = Requirements(tuple(item for item in lines if not item.number), (), "")
        if line := own.line_of(words):
            package = line.text.partition(";")[0].strip()
            return f"see that the index has {package}, which {line.file} needs" if not self._wanted.is_offline else ""
        return f"mend {REQUIREMENTS_FILE}"


_NETWORK = re.compile(
    r"SSLError|CERTIFICATE_VERIFY_FAILED|NewConnectionError|NameResolutionError|ConnectTimeoutError|ProxyError|"
    r"Could not fetch URL"
)
_RAISED = re.compile(r"(?:\w+\.)*([A-Z]\w*: .*)")


def _unreachable(words: str, errors: Sequence[str]) -> str:
    """The line that says that an index does not answer; empty where that is not why pip failed: it tries again, and
    what fails after it was let in is another matter."""
    found = [line.strip() for line in words.splitlines() if _NETWORK.search(line)]
    blamed = not errors or any(_NETWORK.search(line) or "from versions: none" in line for line in errors)
    if not found or not blamed:
        return ""
    certificates = [line for line in found if "CERTIFICATE" in line or "SSLError" in line]
    told = certificates or found
    return next((line for line in told if line.startswith("Could not fetch URL")), told[-1])


def _exception(words: str) -> str:
    """The end of a traceback: its exception, without the module's name."""
    lines = words.splitlines()
    for index in reversed(range(len(lines))):
        if match := _RAISED.fullmatch(lines[index]):
            return "\n".join([match[1], *lines[index + 1 :]])
    return ""


def _marker(line: Line) -> str:
    """The condition of a line as an installer repeats it; a text that no words hold where it has none."""
    return line.text.partition(";")[2].split(" --")[0].strip() or "\0"


def _masked(text: str) -> str:
    """The text with no credentials in its addresses: neither before their `@` nor behind their `?`."""
    return re.sub(r"((?:\w+:/)?/[^\s?'\"]*)\?[^\s'\")]+", r"\1?***", without_credentials(text))


def without_credentials(text: str) -> str:
    """The text with what addresses carry before their `@` left out."""
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1***@", text)


def _plain(environ: Mapping[str, str]) -> dict[str, str]:
    """The builder's environment without what would lead an interpreter elsewhere."""
    return {k: v for k, v in environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP"}}


def _venv(home: Path, environ: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(home)]
    done = subprocess.run(command, env=_plain(environ), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(
            "No environment can be made in the build image.",
            why=_last(done.stderr or done.stdout, 2),
            hint="On Debian, the package python3-venv has what makes one.",
            code="installer-missing",
        )


def _installer(work: Path, environ: Mapping[str, str]) -> list[str]:
    """The command that runs pip: the build image's own, or one out of Python's bundle, put into `work`."""
    own = [sys.executable, "-m", "pip"]
    if subprocess.run([*own, "--version"], env=environ, capture_output=True, check=False).returncode == 0:
        return own
    home = work / "pip"
    done = subprocess.run(
        [sys.executable, "-m", "venv", str(home)], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(
            "The build image has no pip.",
            why=_last(done.stderr or done.stdout, 2),
            hint="On Debian, the package python3-venv brings one.",
            code="installer-missing",
        )
    return [str(home / "bin" / "python"), "-m", "pip"]


def _base_packages() -> list[str]:
    done = subprocess.run([sys.executable, "-I", "-c", _BASE], capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stdout)["base"]
    return names


def _base_version(name: str) -> str:
    """The version of a package that the base image brings. Raises `ConfigError` where it cannot be imported."""
    command = [sys.executable, "-I", "-c", _IMPORT, normalised(name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return str(json.loads(done.stdout.splitlines()[-1])["version"])
    raise ConfigError(
        f"The base image does not bring {name}.",
        why=f"In the build image: {_last(done.stderr, 1)}",
        hint="Leave it out of BP_GPUFN_FROM_BASE, or take a base image that has it.",
        code="not-in-base",
    )


def _vouch(home: Path, name: str, version: str) -> Path:
    """Tells the installer that a package is there, and that what it needs is the base image's business.

    Distributions patch what their packages need and leave the metadata as it was: Debian's torch asks for a sympy
    that Debian does not have. Returns what has to be removed again.
    """
    folder = site_packages(home)[0] / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return folder


def _refuse_doubles(home: Path, from_base: Iterable[str]) -> None:
    doubles = sorted({name for name, _ in installed(home)} & set(from_base))
    if doubles:
        raise ConfigError(
            f"{', '.join(doubles)} would be in the image twice.",
            why="A requirement asks for another version than the base image brings.",
            hint="Ask for that version, or leave it out of BP_GPUFN_FROM_BASE.",
            code="package-twice",
        )


def _tidy(home: Path) -> None:
    """Leaves out what only an installer or a shell of a person wants, and what names this build."""
    for name in ("include", "share/man"):
        shutil.rmtree(home / name, ignore_errors=True)
    for path in (*home.glob("bin/activate*"), *home.glob("bin/Activate*")):
        path.unlink()
    for site in site_packages(home):
        for path in site.glob("*.dist-info/direct_url.json"):
            path.unlink()
            record = path.with_name("RECORD")
            lines = record.read_text(encoding="utf-8").splitlines(keepends=True) if record.exists() else []
            record.write_text("".join(li for li in lines if "direct_url.json" not in li), encoding="utf-8")


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _last(text: str, count: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-count:])
