"""A client of the Docker Engine API over its Unix socket: as much of it as the container host needs.

Podman's compatible API (``podman system service``) is spoken to in the same way. Each call is one connection,
so that one that hangs holds nobody up.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from adapter.errors import AdapterError, ConfigError, Conflict, NotFound, Timeout, Unavailable

_VERSION = "v1.40"
"""Of the API: Docker 19.03 has it, and so has Podman 4."""

_ANSWER_LIMIT_S = 60.0
_PULL_LIMIT_S = 3600.0
_LINE_LIMIT_BYTES = 2**20
_BODY_LIMIT_BYTES = 2**26
_FRAME_HEADER_BYTES = 8
_WORDS_LIMIT = 600
"""Characters of what an engine says that are worth repeating."""
_STARTERS = "systemctl start docker, or: systemctl --user start podman.socket"

_ERRORS: dict[int, type[AdapterError]] = {400: ConfigError, 404: NotFound, 409: Conflict}


@dataclass(frozen=True, slots=True)
class Image:
    """What an image says of itself."""

    id: str
    labels: dict[str, str]
    user: str
    environment: dict[str, str]
    origins: tuple[str, ...] = ()
    """Names by which it can be fetched again: ``registry/repository@sha256:…``."""


def socket_path(environ: Mapping[str, str] = os.environ) -> str:
    """The engine's socket: of DOCKER_HOST, else the first that is there: Docker's, Podman's.

    Raises `ConfigError` for an address that is no Unix socket: a host shares sockets and folders with its containers.
    """
    address = environ.get("DOCKER_HOST", "")
    if address:
        path = address.removeprefix("unix://")
        if not path.startswith("/"):
            raise ConfigError(
                f"DOCKER_HOST={address} cannot be used.",
                why="Replicas get sockets and folders of this machine, so that their engine must be here too.",
                hint="Write unix:///path/of/the/socket.",
                code="bad-engine",
            )
        return path
    runtime = environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    places = (
        "/var/run/docker.sock",
        f"{runtime}/docker.sock",
        "/run/podman/podman.sock",
        f"{runtime}/podman/podman.sock",
    )
    return next((place for place in places if os.path.exists(place)), places[0])


class Engine:
    """One engine. Every method raises `Unavailable` where nobody answers, and what the engine refuses by name."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def version(self) -> str:
        """``Docker 26.1.5`` or ``Podman 5.4.2``."""
        said = await self._json("GET", "/version")
        parts = [str(part.get("Name", "")) for part in said.get("Components", [])]
        name = "Podman" if any("Podman" in part for part in parts) else "Docker"
        return f"{name} {said.get('Version', '')}"

    async def networks(self) -> set[str]:
        """Names of the networks that containers can be joined to."""
        return {str(network["Name"]) for network in await self._json("GET", "/networks")}

    # Images -------------------------------------------------------------------------------------

    async def image(self, reference: str) -> Image:
        """Raises `NotFound`."""
        try:
            said = await self._json("GET", f"/images/{quote(reference, safe='/:@')}/json")
        except NotFound as exc:
            raise NotFound(
                f"There is no image {reference} on this machine.",
                why=exc.why,
                hint=f"Build it, or fetch it with: docker pull {reference}",
                code="image-unknown",
            ) from exc
        config = said.get("Config") or {}
        pairs = (text.partition("=") for text in config.get("Env") or [])
        environment = {name: value for name, _, value in pairs}
        labels, origins = dict(config.get("Labels") or {}), tuple(map(str, said.get("RepoDigests") or ()))
        return Image(str(said["Id"]), labels, str(config.get("User") or ""), environment, origins)

    async def pull(self, reference: str) -> None:
        """From its registry, with nobody's credentials. Raises `NotFound` with the registry's words."""
        name, tag = name_and_tag(reference)
        query = urlencode({"fromImage": name, "tag": tag})
        try:
            said = await self._call("POST", f"/images/create?{query}", limit_s=_PULL_LIMIT_S)
        except (NotFound, Conflict, ConfigError, Unavailable) as exc:
            if exc.code == "no-engine":
                raise
            raise _not_pulled(reference, exc.why) from exc
        for line in said.splitlines():
            error = json.loads(line).get("error")
            if error:
                raise _not_pulled(reference, str(error))

    # Containers ---------------------------------------------------------------------------------

    async def create(self, name: str, config: Mapping[str, Any]) -> str:
        """A container that does not run yet; returns its id. Raises `NotFound` for a missing image."""
        said = await self._json("POST", f"/containers/create?{urlencode({'name': name})}", config)
        return str(said["Id"])

    async def start(self, container: str) -> None:
        await self._call("POST", f"/containers/{container}/start")

    async def remove(self, container: str) -> None:
        """With what it wrote, running or not; returns when it is gone. One that is gone already is no error."""
        try:
            await self._call("DELETE", f"/containers/{container}?force=true&v=true")
        except NotFound:
            return
        except Conflict:  # somebody else removes it at this moment
            with suppress(NotFound):
                await self._call("POST", f"/containers/{container}/wait?condition=removed")

    async def wait(self, container: str) -> int:
        """Until it has ended, for as long as that takes; returns its exit code."""
        said = await self._json("POST", f"/containers/{container}/wait", limit_s=None)
        return int(said["StatusCode"])

    async def labelled(self, label: str) -> list[str]:
        """Ids of the containers with ``name=value`` as a label, running or not."""
        query = urlencode({"all": "true", "filters": json.dumps({"label": [label]})})
        return [str(item["Id"]) for item in await self._json("GET", f"/containers/json?{query}")]

    async def file(self, container: str, path: str) -> bytes:
        """The content of a small file in a container's root. Raises `NotFound`."""
        import io
        import tarfile

        data = await self._call("GET", f"/containers/{container}/archive?{urlencode({'path': path})}")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    return file.read()
        raise NotFound(f"{path} is no file there.", code="not-a-file")

    @asynccontextmanager
    async def output(self, container: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """What it prints from now on, both streams as they come, until it ends."""
        path = f"/containers/{container}/attach?stream=1&stdout=1&stderr=1"
        reader, writer = await self._send("POST", path, None, upgrade=True)
        try:
            status, headers = await _head(reader)
            if status not in (101, 200):
                raise _refusal(status, await reader.read(_LINE_LIMIT_BYTES))
            chunked = headers.get("transfer-encoding", "").lower() == "chunked"
            yield _frames(_chunks(reader) if chunked else _raw(reader))
        finally:
            writer.close()

    # HTTP ---------------------------------------------------------------------------------------

    async def _json(self, method: str, path: str, body: Any = None, *, limit_s: float | None = _ANSWER_LIMIT_S) -> Any:
        data = await self._call(method, path, body, limit_s=limit_s)
        try:
            return json.loads(data)
        except ValueError as exc:
            raise Unavailable(
                f"The container engine at {self.path} answered something else than JSON.",
                why=f"{data[:80]!r}.",
                hint="Name the socket of Docker or Podman in DOCKER_HOST.",
                code="no-engine",
            ) from exc

    async def _call(
        self, method: str, path: str, body: Any = None, *, limit_s: float | None = _ANSWER_LIMIT_S
    ) -> bytes:
        try:
            return await asyncio.wait_for(self._exchange(method, path, body), limit_s)
        except asyncio.TimeoutError as exc:
            raise Timeout(
                f"The container engine at {self.path} does not answer.",
                why=f"{method} {path.partition('?')[0]} took more than {limit_s:g} s.",
                hint="See what it does: its log, or docker info",
                code="engine-hangs",
            ) from exc
        except (OSError, EOFError, ValueError) as exc:
            raise self._gone(exc) from exc

    async def _exchange(self, method: str, path: str, body: Any) -> bytes:
        reader, writer = await self._send(method, path, body)
        try:
            status, headers = await _head(reader)
            data = await _body(reader, headers)
        finally:
            writer.close()
        if status >= 400:
            raise _refusal(status, data)
        return data

    async def _send(
        self, method: str, path: str, body: Any, *, upgrade: bool = False
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            reader, writer = await asyncio.open_unix_connection(self.path, limit=_LINE_LIMIT_BYTES)
        except OSError as exc:
            raise self._gone(exc) from exc
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} /{_VERSION}{path} HTTP/1.1", "Host: engine", f"Content-Length: {len(data)}"]
        lines += ["Connection: Upgrade", "Upgrade: tcp"] if upgrade else ["Connection: close"]
        lines += ["Content-Type: application/json"] if data else []
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        return reader, writer

    def _gone(self, error: Exception) -> Unavailable:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        return Unavailable(
            f"No container engine answers at {self.path}.",
            why=f"{said}.",
            hint=f"Start it ({_STARTERS}), or name its socket in DOCKER_HOST.",
            code="no-engine",
        )


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = (await reader.readuntil(b"\r\n")).split(None, 2)
    headers = {}
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(status[1]), headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    parts, size = [], 0
    stream = _chunks(reader) if headers.get("transfer-encoding", "").lower() == "chunked" else _raw(reader)
    async for part in stream:
        parts.append(part)
        size += len(part)
        if size > _BODY_LIMIT_BYTES:
            raise ValueError("its answer does not end")
    return b"".join(parts)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _raw(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(65536):
        yield data


async def _frames(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The payloads of the engine's frames: stream (1), zeros (3), length (4), payload."""
    rest = b""
    async for data in stream:
        rest += data
        while len(rest) >= _FRAME_HEADER_BYTES:
            size = int.from_bytes(rest[4:_FRAME_HEADER_BYTES], "big")
            if len(rest) < _FRAME_HEADER_BYTES + size:
                break
            yield rest[_FRAME_HEADER_BYTES : _FRAME_HEADER_BYTES + size]
            rest = rest[_FRAME_HEADER_BYTES + size :]


def _refusal(status: int, data: bytes) -> AdapterError:
    try:
        said = str(json.loads(data)["message"]).strip()
    except (ValueError, KeyError, TypeError):
        said = data.decode(errors="replace").strip()[:200] or f"status {status}"
    if len(said) > _WORDS_LIMIT:  # some repeat what they were asked for
        said = f"{said[: _WORDS_LIMIT // 2]} … {said[-_WORDS_LIMIT // 2 :]}"
    kind = _ERRORS.get(status, Unavailable)
    code = "engine-refused" if kind is not NotFound else "not-found"
    return kind("The container engine refused.", why=said.rstrip(".") + ".", code=code)


def _not_pulled(reference: str, why: str) -> NotFound:
    return NotFound(
        f"The image {reference} is not on this machine and cannot be fetched.",
        why=why.rstrip(".") + ".",
        hint=f"Build it, or see why with: docker pull {reference}",
        code="image-unknown",
    )


def name_and_tag(reference: str) -> tuple[str, str]:
    """``registry:5000/name:tag`` taken apart; a digest stands in the place of a tag."""
    rest, _, digest = reference.partition("@")
    head, slash, last = rest.rpartition("/")
    name, _, tag = last.partition(":")
    return f"{head}{slash}{name}", digest or tag or "latest"
