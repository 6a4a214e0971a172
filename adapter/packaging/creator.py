"""Runs the lifecycle of Cloud Native Buildpacks for one folder: in a container of the builder image, or in place where
this process is in one already. What it needs is sent in as one archive, so that the engine may be on another machine.

Knows nothing of terminals: lines of the lifecycle go to whoever watches.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from adapter.errors import AdapterError, ConfigError, NotFound, Unavailable
from adapter.packaging import application
from adapter.packaging.assemble import BUILDPACK_ID, assemble
from adapter.packaging.layers import to_toml

CREATOR = "/cnb/lifecycle/creator"
PLATFORM_API = "0.13"
WORKSPACE = "/workspace"
ENGINES = ("docker", "podman")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PHASE = re.compile(r"===> ([A-Z]+)")
_CA_BINDING = "ca-certificates"
CA_SETTINGS = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
"""Variables that name a bundle: pip's, requests', and that of Python's ssl and of most else."""
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_RUN_TOML = "/cnb/run.toml"
_UNKNOWN_IMAGE = re.compile(
    r"not found|manifest unknown|name unknown|no such image|does not exist|access[^:]* denied", re.IGNORECASE
)
_SECRET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SOCKETS = {"docker": ("/var/run/docker.sock",), "podman": ("/run/podman/podman.sock",)}


@dataclass(frozen=True, slots=True)
class Request:
    """One build. `settings` are the build's variables, `secrets` files that only the build sees, by binding.

    Where the image goes: to `layout` (an OCI layout folder), to its registry with `publish`, else to the engine.
    `ca` is a bundle of certificates that downloads of the build trust, and no others then; no layer has it.
    `cache` is a folder or a volume's name. `registry_auth` is a header a registry, as the lifecycle takes it.
    """

    folder: Path
    image: str
    builder: str = ""
    run_image: str = ""
    publish: bool = False
    layout: Path | None = None
    cache: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    ca: Path | None = None
    wheels: Path | None = None
    criu: Path | None = None
    network: str = ""
    engine: str = ""
    registry_auth: Mapping[str, str] = field(default_factory=dict, repr=False)
    insecure: tuple[str, ...] = ()


Watch = Callable[[str, str], None]
"""Called with the phase (``ANALYZING`` …) and a line of it, without colours; the line is empty when a phase begins."""


def in_place() -> bool:
    """Whether this process is in a builder's container, with the lifecycle beside it."""
    return os.access(CREATOR, os.X_OK)


def create(request: Request, watch: Watch) -> Transcript:
    """Build the image. Raises `AdapterError`: the buildpack's own error where it had one."""
    with tempfile.TemporaryDirectory(prefix="gpufn-build-") as work:
        parts = _Parts(request, Path(work))

        def told(phase: str, line: str) -> None:
            watch(phase, parts.as_given(line))

        try:
            if not request.builder and in_place():
                return _in_place(request, parts, told)
            return _in_container(request, parts, told)
        except AdapterError as error:
            error.why, error.hint = map(parts.as_given, (error.why, error.hint))
            raise


# What is sent in ------------------------------------------------------------------------------------------------


class _Parts:
    """What the lifecycle finds: the function folder, the buildpack, settings and secrets."""

    def __init__(self, request: Request, work: Path) -> None:
        self._request = request
        self._buildpack = work / "buildpack"
        assemble(self._buildpack, wheels=request.wheels, criu=request.criu)
        version = re.search(r'^version = "(.+)"', (self._buildpack / "buildpack.toml").read_text(), re.MULTILINE)
        assert version is not None
        self._version = version[1]
        self._place = f"buildpacks/{BUILDPACK_ID.replace('/', '_')}/{self._version}"
        self._ca = _read_bundle(request.ca) if request.ca else ""
        self._ignore = application.read_ignore(request.folder)
        for _ in application.entries(request.folder, self._ignore):
            pass  # raises before anything is started

    def archive(self, stream: io.BufferedIOBase | io.RawIOBase, root: str, owner: tuple[int, int]) -> None:
        """Write everything as one archive whose names begin at ``/``: the application, and the rest below `root`."""
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            writer = _Writer(tar, owner)
            writer.folder(WORKSPACE)
            for path, _ in self._application():
                writer.path(path, f"{WORKSPACE}/{path.relative_to(self._request.folder)}")
            place = f"{root}/{self._place}"
            for path in sorted(self._buildpack.rglob("*")):
                writer.path(path, f"{place}/{path.relative_to(self._buildpack)}", (0, 0))
            group = {"id": BUILDPACK_ID, "version": self._version}
            writer.text(f"{root}/order.toml", to_toml({"order": [{"group": [group]}]}))
            writer.folder(f"{root}/platform/env")
            settings = {"BP_GPUFN_DETECT": "on"}  # whoever names the folder means it
            if self._request.wheels is not None:
                settings["BP_GPUFN_WHEELS"] = f"{place}/{application.WHEELS_FOLDER}"
            if self._ca:
                bundle = f"{root}/platform/bindings/{_CA_BINDING}/ca.pem"
                writer.text(bundle.replace("ca.pem", "type"), _CA_BINDING)
                writer.text(bundle, self._ca)
                settings |= dict.fromkeys(CA_SETTINGS, bundle)
            for name, value in {**settings, **self._request.settings}.items():
                writer.text(f"{root}/platform/env/{name}", value)
            for name, path in self._request.secrets.items():
                binding = f"{root}/platform/bindings/{name}"
                writer.text(f"{binding}/type", name, mode=0o400)
                writer.text(f"{binding}/token", _read_secret(name, path), mode=0o400)
            writer.folder("/layers")

    def as_given(self, text: str) -> str:
        """The text with folders of wheels named as they are here, not as the build sees them."""
        if self._request.wheels is not None:
            inside = rf"[^\s'\"]*/{re.escape(self._place)}/{application.WHEELS_FOLDER}\b"
            text = re.sub(inside, lambda _: str(self._request.wheels), text)
        own = self._request.folder / application.WHEELS_FOLDER
        return re.sub(rf"(?<![\w./-]){WORKSPACE}/{application.WHEELS_FOLDER}\b", lambda _: str(own), text)

    def _application(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The folder as the build sees it: wheels too, which the image will not have."""
        folder = self._request.folder
        yield from application.entries(folder, self._ignore)
        wheels = folder / application.WHEELS_FOLDER
        if wheels.is_dir() and not wheels.is_symlink():
            yield wheels, os.lstat(wheels)
            for path in sorted(wheels.iterdir()):
                if path.suffix == ".whl" and path.is_file():
                    yield path, os.stat(path)
        if (folder / application.IGNORE_FILE).is_file():
            yield folder / application.IGNORE_FILE, os.stat(folder / application.IGNORE_FILE)


def _read_secret(name: str, path: Path) -> str:
    if not _SECRET_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a secret.", hint="Write: --secret huggingface=FILE", code="bad-name")
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "It is no text"
        raise ConfigError(f"The secret {name} cannot be read.", why=f"{path}: {why}.", code="bad-secret") from exc


def _read_bundle(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "It is no text"
        raise ConfigError(f"{path} cannot be read.", why=f"{why}.", code="bad-ca") from exc
    if "-----BEGIN CERTIFICATE-----" not in text:
        raise ConfigError(
            f"{path} holds no certificate.",
            why="No line of it is -----BEGIN CERTIFICATE-----.",
            hint="Name a bundle in PEM form: all that the build is to trust.",
            code="bad-ca",
        )
    return text


@dataclass(slots=True)
class _Writer:
    """Adds files to an archive as the build's user owns them."""

    tar: tarfile.TarFile
    owner: tuple[int, int]

    def path(self, path: Path, name: str, owner: tuple[int, int] | None = None) -> None:
        info = self.tar.gettarinfo(path, arcname=name.lstrip("/"))
        info.uid, info.gid = owner or self.owner
        info.uname = info.gname = ""
        if info.islnk():  # a hard link within the folder: a file of its own in the build
            info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
        if info.isreg():
            with path.open("rb") as file:
                self.tar.addfile(info, file)
        else:
            self.tar.addfile(info)

    def text(self, name: str, text: str, mode: int = 0o644) -> None:
        data = text.encode()
        info = tarfile.TarInfo(name.lstrip("/"))
        info.size, info.mode = len(data), mode
        info.uid, info.gid = self.owner
        self.tar.addfile(info, io.BytesIO(data))

    def folder(self, name: str) -> None:
        info = tarfile.TarInfo(name.lstrip("/"))
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        info.uid, info.gid = self.owner
        self.tar.addfile(info)


def _words(request: Request, root: str) -> list[str]:
    """The command line of the creator, but for where the image goes and what it rests on."""
    words = [CREATOR, f"-app={WORKSPACE}", "-layers=/layers", f"-buildpacks={root}/buildpacks"]
    words += [f"-order={root}/order.toml", f"-platform={root}/platform", "-no-color"]
    if request.run_image:
        words.append(f"-run-image={request.run_image}")
    return words + [f"-insecure-registry={registry}" for registry in request.insecure]


# In place -------------------------------------------------------------------------------------------------------


def _in_place(request: Request, parts: _Parts, watch: Watch) -> Transcript:
    if not request.publish and request.layout is None:
        raise ConfigError(
            "There is no engine here that could keep the image.",
            why="This is a builder's container.",
            hint="Add --publish, or --layout FOLDER.",
            code="no-target",
        )
    if not request.run_image and not os.environ.get("CNB_RUN_IMAGE") and not os.path.exists(_RUN_TOML):
        raise _no_run_image(f"This builder names none: it has no {_RUN_TOML}.")
    if Path(WORKSPACE).is_dir() and any(Path(WORKSPACE).iterdir()):
        raise ConfigError(
            f"{WORKSPACE} is not empty.",
            why="The application folder of a build is there, and what is in it would be in the image.",
            hint="Keep the checkout elsewhere, and name its folder: gpufn build FOLDER IMAGE",
            code="folder-exists",
        )
    ids = _ids(os.environ)
    with tempfile.TemporaryDirectory(prefix="gpufn-") as root:
        os.chmod(root, 0o755)  # noqa: S103  # the build runs as another user
        with tempfile.TemporaryFile() as file:
            parts.archive(file, root, ids)
            file.seek(0)
            with tarfile.open(fileobj=file) as tar:
                tar.extractall("/", filter="fully_trusted")  # noqa: S202  # written a moment ago
        words = _words(request, root)
        environ = {**os.environ, "CNB_PLATFORM_API": PLATFORM_API}
        if request.registry_auth:
            environ["CNB_REGISTRY_AUTH"] = json.dumps(dict(request.registry_auth))
        if request.layout is not None:
            environ |= {"CNB_EXPERIMENTAL_MODE": "warn"}
            words += ["-layout", f"-layout-dir={request.layout}"]
        if request.cache:
            words += [f"-cache-dir={request.cache}" if "/" in request.cache[:2] else f"-cache-image={request.cache}"]
        return _watched([*words, request.image], environ, watch)


def _ids(environ: Mapping[str, str]) -> tuple[int, int]:
    return int(environ.get("CNB_USER_ID") or 1000), int(environ.get("CNB_GROUP_ID") or 1000)


# In a container -------------------------------------------------------------------------------------------------


def _in_container(request: Request, parts: _Parts, watch: Watch) -> Transcript:
    if not request.builder:
        raise ConfigError(
            "It is not said which image builds.",
            why="A builder image has the lifecycle and the Python that the function gets.",
            hint="Name one: gpufn build FOLDER IMAGE --builder IMAGE --run-image IMAGE (docs/how-to/base-images.md)",
            code="no-builder",
        )
    engine = _Engine(request.engine or found_engine())
    builder = engine.environment_of(request.builder, option="--builder")
    ids = _ids(builder)
    root = "/gpufn"
    words, options = _words(request, root), ["--env", f"CNB_PLATFORM_API={PLATFORM_API}", "--user", "0"]
    environ = dict(os.environ)
    if request.registry_auth:
        options += ["--env", f"DOCKER_CONFIG={root}/docker"]  # a file: variables are shown by `docker inspect`
    if request.layout is not None and not request.run_image:
        raise _no_run_image("A layout needs it by name.")
    if request.network:
        options += ["--network", request.network]
    if request.cache:
        options += ["--volume", f"{request.cache}:/gpufn-cache"]
        words.append("-cache-dir=/gpufn-cache")
    if request.layout is not None:
        options += ["--env", "CNB_EXPERIMENTAL_MODE=warn"]
        words += ["-layout", "-layout-dir=/gpufn-layout"]
    elif not request.publish:
        more = _for_engine(engine, request)
        words += more[0]
        options += more[1]
    with engine.container(request.builder, [*words, request.image], options, environ) as container:
        if not request.run_image and not builder.get("CNB_RUN_IMAGE") and not engine.has_file(container, _RUN_TOML):
            raise _no_run_image(f"{request.builder} names none: it has no {_RUN_TOML}.")
        engine.send(container, lambda stream: parts.archive(stream, root, ids))
        if request.registry_auth:
            engine.send(container, lambda stream: _send_logins(stream, f"{root}/docker", request.registry_auth))
        if request.layout is not None:
            _send_layout(engine, container, request, ids)
        done = _watched([engine.name, "start", "--attach", container], environ, watch)
        if request.layout is not None:
            engine.fetch(
                container, f"/gpufn-layout/{layout_path(request.image)}", request.layout / layout_path(request.image)
            )
        return done


def no_image(image: str, option: str, why: str) -> NotFound:
    """`option` names an image that is nowhere."""
    return NotFound(
        f"There is no image {image}.",
        why=why,
        hint=f"Check {option}: its name, and that you are logged in where it is private (docs/how-to/base-images.md).",
        code="no-image",
    )


def _no_run_image(why: str) -> ConfigError:
    return ConfigError(
        "It is not said which image the function's image rests on.",
        why=why,
        hint="Name one: --run-image IMAGE (docs/how-to/base-images.md)",
        code="no-run-image",
    )


def _send_logins(stream: io.BufferedIOBase, folder: str, headers: Mapping[str, str]) -> None:
    """Registries' credentials as Docker keeps them. Root's: the lifecycle reads them before it becomes the build's user."""
    auths = {
        _DOCKER_HUB_KEY if host == "docker.io" else host: {"auth": header.removeprefix("Basic ")}
        for host, header in headers.items()
    }
    with tarfile.open(fileobj=stream, mode="w|") as tar:
        writer = _Writer(tar, (0, 0))
        writer.folder(folder)
        writer.text(f"{folder}/config.json", json.dumps({"auths": auths}), mode=0o600)


def _for_engine(engine: _Engine, request: Request) -> tuple[list[str], list[str]]:
    """The creator's words and the engine's options where the engine keeps the image.

    Layers are kept in a volume of the image's name beside it, as pack does: to have one back out of an engine, all of
    the image would have to be saved, and the lifecycle cannot. Without that volume, all layers are made anew.
    """
    if request.run_image:
        engine.environment_of(
            request.run_image, option="--run-image"
        )  # the lifecycle looks for it in the engine, and pulls nothing
    volume = f"gpufn-build-{hashlib.sha256(request.image.encode()).hexdigest()[:12]}"
    words = ["-daemon", "-launch-cache=/gpufn-launch", *([] if engine.has_volume(volume) else ["-skip-restore"])]
    options = ["--volume", f"{volume}:/gpufn-launch", "--volume", f"{engine.socket()}:/var/run/docker.sock"]
    return words, [*options, "--env", "DOCKER_HOST=unix:///var/run/docker.sock"]


def layout_path(image: str) -> PurePosixPath:
    """Where an image lies in a layout folder of the lifecycle: registry, repository, then tag or digest."""
    rest, _, digest = image.partition("@")
    first, slash, behind = rest.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        first, behind = "index.docker.io", rest if slash else f"library/{rest}"
    repository, _, tag = behind.partition(":")
    last = digest.replace(":", "/") if digest else tag or "latest"
    return PurePosixPath(first) / repository / last


def _send_layout(engine: _Engine, container: str, request: Request, owner: tuple[int, int]) -> None:
    """What the lifecycle finds on its disk: the run image, and the image as it was."""
    assert request.layout is not None
    previous = Path(request.layout, layout_path(request.image))
    with tempfile.TemporaryDirectory(prefix="gpufn-layout-") as work:
        run = Path(request.layout, layout_path(request.run_image))
        if not (run / "index.json").exists():
            run = Path(work)
            _fetch_layout(request.run_image, run, request.insecure)

        def write(stream: io.BufferedIOBase) -> None:
            with tarfile.open(fileobj=stream, mode="w|") as tar:
                writer = _Writer(tar, owner)
                writer.folder("gpufn-layout")
                for image, folder in ((request.run_image, run), (request.image, previous)):
                    place = PurePosixPath("gpufn-layout") / layout_path(image)
                    for parent in reversed(place.parents[:-2]):
                        writer.folder(str(parent))
                    writer.folder(str(place))
                    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
                        writer.path(path, f"{place}/{path.relative_to(folder)}")

        engine.send(container, write)


def _fetch_layout(image: str, folder: Path, insecure: Sequence[str]) -> None:
    if shutil.which("skopeo") is None:
        raise Unavailable(
            f"The run image {image} cannot be fetched into a layout.",
            why="skopeo, which copies images between registries and folders, is not installed.",
            hint=f"Install it, or put the image there yourself: DIR/{layout_path(image)}",
            code="tool-missing",
        )
    plain = ["--src-tls-verify=false"] if image.partition("/")[0] in insecure else []
    done = subprocess.run(
        ["skopeo", "copy", "--quiet", *plain, f"docker://{image}", f"oci:{folder}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unavailable(
            f"The run image {image} cannot be fetched.",
            why=done.stderr.strip().splitlines()[-1]
            if done.stderr.strip()
            else f"skopeo ended with {done.returncode}.",
            hint="Check --run-image.",
            code="registry",
        )


def found_engine() -> str:
    """The first of `ENGINES` on the PATH. Raises `Unavailable`."""
    for name in ENGINES:
        if shutil.which(name):
            return name
    raise Unavailable(
        "There is no container engine here.",
        why=f"Neither {' nor '.join(ENGINES)} is on the PATH.",
        hint="Install one, or build in a container of the builder image: docs/how-to/build-in-ci.md",
        code="no-engine",
    )


@dataclass(frozen=True, slots=True)
class _Engine:
    """Docker's command line, or Podman's, which is the same for what is used here."""

    name: str

    def _run(self, *words: str, environ: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [self.name, *words], env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["It said nothing."]
            raise Unavailable(
                f"{self.name} {words[0]} failed.",
                why=said[-1].strip(),
                hint=f"See that the engine runs: {self.name} info",
                code="engine-failed",
            )
        return done.stdout.strip()

    def environment_of(self, image: str, *, option: str) -> dict[str, str]:
        """The variables of an image, which is pulled where the engine does not have it; `option` named it."""
        form = ["--format", "{{json .Config.Env}}", image]
        try:
            said = self._run("image", "inspect", *form)
        except Unavailable:
            try:
                self._run("pull", "--quiet", image)
            except Unavailable as error:
                if not _UNKNOWN_IMAGE.search(error.why):
                    raise
                raise no_image(image, option, error.why) from error
            said = self._run("image", "inspect", *form)
        return dict(entry.split("=", 1) for entry in json.loads(said) or [])

    def has_file(self, container: str, path: str) -> bool:
        command = [self.name, "cp", f"{container}:{path}", "-"]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0

    def has_volume(self, name: str) -> bool:
        command = [self.name, "volume", "inspect", name]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0

    def socket(self) -> str:
        """Where the engine listens, for the lifecycle to hand the image to."""
        address = os.environ.get("DOCKER_HOST" if self.name == "docker" else "CONTAINER_HOST", "")
        if address.startswith("unix://"):
            return address.removeprefix("unix://")
        if address:
            raise ConfigError(
                "The image cannot be handed to the engine.",
                why=f"It is not on this machine: {address}",
                hint="Add --publish, or --layout FOLDER.",
                code="no-target",
            )
        user = f"/run/user/{os.getuid()}/podman/podman.sock"
        places = [*_SOCKETS[self.name], *([user] if self.name == "podman" else [])]
        found = next((place for place in places if os.path.exists(place)), None)
        if found is None:
            raise Unavailable(
                f"{self.name}'s socket is not there.",
                why=f"Looked at {', '.join(places)}.",
                hint="Start it (systemctl start podman.socket), or add --publish.",
                code="no-engine",
            )
        return found

    @contextmanager
    def container(
        self, image: str, words: Sequence[str], options: Sequence[str], environ: Mapping[str, str]
    ) -> Iterator[str]:
        """A container that is not started yet, and gone afterwards."""
        name = self._run("create", *options, "--entrypoint", words[0], image, *words[1:], environ=environ).splitlines()[
            -1
        ]
        try:
            yield name
        finally:
            self._run("rm", "--force", "--volumes", name)

    def send(self, container: str, write: Callable[[io.BufferedIOBase], None]) -> None:
        """Put an archive's files into a container, from its root."""
        command = [self.name, "cp", "--archive=false", "-", f"{container}:/"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as copy:
            assert copy.stdin is not None
            assert copy.stderr is not None
            try:
                write(copy.stdin)  # type: ignore[arg-type]
                copy.stdin.close()
            except BrokenPipeError:
                pass  # its own words say why
            said = copy.stderr.read().decode(errors="replace").strip()
        if copy.returncode:
            raise Unavailable("The function could not be sent to the builder.", why=said, code="engine-failed")

    def fetch(self, container: str, source: str, target: Path) -> None:
        """Bring a folder out of a container, in the place of what was there."""
        with tempfile.TemporaryDirectory(prefix=".gpufn-", dir=_made(target.parent)) as work:
            self._run("cp", f"{container}:{source}", work)
            shutil.rmtree(target, ignore_errors=True)
            (Path(work) / PurePosixPath(source).name).rename(target)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# What it says ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Transcript:
    """What the lifecycle said: all lines, by phase."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, raw: str) -> tuple[str, str]:
        """One more line; returns its phase, and its text, which is empty when it begins a phase."""
        line = _ANSI.sub("", raw).rstrip()
        phase = self.lines[-1][0] if self.lines else ""
        match = _PHASE.match(line)
        entry = (match[1], "") if match else (phase, line)
        self.lines.append(entry)
        return entry

    @property
    def reused(self) -> set[str]:
        """Names of the layers that were as before; `app` is the application."""
        found = {
            match[1].rpartition(":")[2] for _, line in self.lines if (match := re.match(r"Reusing layer '(.+)'", line))
        }
        if any(re.match(r"Reused (\d+)/\1 app layer", line) for _, line in self.lines):
            found.add("app")
        return found

    @property
    def digest(self) -> str:
        """The image's digest, or its id where an engine keeps it."""
        for _, line in self.lines:
            if match := re.search(r"\*\*\* (?:Images|Image ID|Digest)[^\n]*?((?:sha256:)?[0-9a-f]{12,64})", line):
                return match[1]
        return ""

    def error(self, code: int) -> AdapterError:
        """Why the lifecycle ended with `code`: in the buildpack's own words where it had some."""
        texts = [line for _, line in self.lines]
        for index, line in enumerate(texts):
            if match := re.match(r"✗ (.*?)  \[([a-z0-9-]+)\]$", line):
                more = [text.strip() for text in texts[index + 1 : index + 3] if text.startswith("  ")]
                why, hint = [*more, "", ""][:2]
                own = Unavailable if match[2] == "index-unreachable" else ConfigError
                return own(match[1], why=why, hint=hint, code=match[2])
        last = next((line for line in reversed(texts) if line.startswith("ERROR:")), texts[-1] if texts else "")
        said = last.removeprefix("ERROR:").strip()
        phase = (self.lines[-1][0] if self.lines else "").lower()
        if code == 20:
            return ConfigError(
                "No buildpack knows this folder.",
                why="It has neither gpufn.toml nor a handler.py.",
                hint="Start one with: gpufn init NAME",
                code="handler-missing",
            )
        kind = Unavailable if phase in {"analyzing", "exporting"} else ConfigError
        return kind(
            f"The build failed while {phase}." if phase else "The build failed.",
            why=said or f"The lifecycle ended with code {code}.",
            hint="See all of what it said with: gpufn build -v …",
            code=f"lifecycle-{code}",
        )


def _watched(words: Sequence[str], environ: Mapping[str, str], watch: Watch) -> Transcript:
    """Run to the end, line by line. Raises `AdapterError` where it ends otherwise than well."""
    transcript = Transcript()
    try:
        process = subprocess.Popen(
            words,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as exc:
        raise NotFound(f"{words[0]} cannot be run.", why=f"{exc.strerror}.", code="no-lifecycle") from exc
    with process:
        assert process.stdout is not None
        for raw in process.stdout:
            watch(*transcript.add(raw))
    if process.returncode:
        raise transcript.error(process.returncode)
    return transcript
