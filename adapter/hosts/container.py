"""The container host: replicas as containers of this machine's engine, Docker or Podman.

    <state>/lock              held while a host runs; a second one is refused
    <state>/replicas/<id>/    what one container is given: `line/` with the socket of its orders, `secrets/`
    <state>/logs/             one file a function
    <state>/criu/             a CRIU for containers of ordinary users, see `adapter.hosts.criu`
    <state>/snapshots/<tenant>/<function>/    of which a container sees its own function's alone

A container gets no port of its own: its entrypoint connects to a socket in its folder, and is given its orders
and the socket that requests arrive on. When this process dies, however it dies, that line ends and replicas
drain; containers that are left behind are known by their label and removed when the next host begins.

Rights: none, but the one that a restore needs, under a system-call profile of our own (`adapter.hosts.seccomp`).
A process cannot be dumped under any profile. So its snapshot is taken in a container that serves nobody, sees no
secret and has no network; where the engine refuses, functions start from the next rung.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from adapter.errors import AdapterError, ConfigError, NotFound, SnapshotError, Unavailable
from adapter.files import remove_tree, write_whole
from adapter.hosts import Deployment, EventSink, Inventory, LocalHost
from adapter.hosts.artifacts import fetch_snapshots
from adapter.hosts.background import Background
from adapter.hosts.container_replica import ContainerReplica, Line
from adapter.hosts.criu import lend
from adapter.hosts.engine import Engine, Image, name_and_tag
from adapter.hosts.inventory import read_inventory
from adapter.hosts.ports import listen
from adapter.hosts.process import check_deployment, copy_secrets, lock_state, settings_of
from adapter.hosts.replica_log import LogWriter, ReplicaLog
from adapter.hosts.seccomp import RESTORE_RIGHT, profile
from adapter.hosts.snapshotter import result_of
from adapter.keys import CONTRACT_VERSION, ENV_CRIU, SECRETS_PATH, SNAPSHOT_PATH
from adapter.replica import STANDBY_VARIABLE, TASK_SNAPSHOT, TASK_VARIABLE, ReplicaSettings

logger = logging.getLogger(__name__)

CONTRACT_LABEL, CONFIG_LABEL = "dev.gpufn.contract", "dev.gpufn.config"
HOST_LABEL = "dev.gpufn.host"
"""On our containers: which state folder they belong to."""
_FUNCTION_LABEL, _REPLICA_LABEL = "dev.gpufn.function", "dev.gpufn.replica"

_FOLDER = "/run/gpufn"
"""Where a container sees its own folder of ours."""
_LENT_CRIU = "/opt/gpufn/lent-criu"
_CLOSE_GRACE_S = 10.0
_RESULT_LIMIT_BYTES = 2**16
_IMAGE_SAYS = frozenset({"folder", "python", "weights_dir", "verify_weights", "runtime_dir", "listen_fd", "events_fd",
                         "commands_fd", "gpu_helper", "gpu_capabilities"})  # fmt: skip
"""Settings that a container has from its image, or needs none of."""


class ContainerHost(LocalHost):
    """See `adapter.hosts.Host`. Make it with `open`, inside a running event loop; close it when done.

    `network` is what functions reach the world through: a network of the engine, ``host`` or ``none``.
    """

    def __init__(
        self, state: Path, engine: Engine, network: str, *, snapshots: Path | None = None, echo: TextIO | None = None
    ) -> None:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._state = state
        self._engine = engine
        self._network = network
        self._snapshots = snapshots or state / "snapshots"
        self._echo = echo
        self._label = f"{HOST_LABEL}={_digest(str(state.resolve()))}"
        self._images: dict[str, Image] = {}
        self._replicas: dict[str, ContainerReplica] = {}
        self._background = Background()
        self._snapshotting: set[str] = set()
        self._fetched: set[tuple[str, str]] = set()
        self._gives_rights = True
        self._podman = False
        self._lent: Path | None = None
        self._users: dict[str, tuple[int, int]] = {}  # of images by id
        self._profile = ""
        self._closing = False
        self._lock = lock_state(state)
        self._logs = LogWriter()

    @classmethod
    async def open(
        cls,
        state: Path,
        engine: Engine,
        *,
        network: str = "",
        snapshots: Path | None = None,
        echo: TextIO | None = None,
    ) -> ContainerHost:
        """Raises `Unavailable` where no engine answers, `Conflict` where the state folder is used."""
        version = await engine.version()
        networks = await engine.networks()
        if network and network not in {*networks, "host", "none"}:
            raise ConfigError(
                f"The engine has no network {network!r}.",
                why=f"It has: {', '.join(sorted(networks))}.",
                hint="Choose one of these, host or none.",
                code="network-unknown",
            )
        chosen = network or next((name for name in ("bridge", "podman") if name in networks), "none")
        if not network and chosen == "none":
            logger.warning("functions have no network", extra={"fields": {"why": "the engine has no bridge"}})
        host = cls(state, engine, chosen, snapshots=snapshots, echo=echo)
        host._podman = version.startswith("Podman")
        try:
            await host._remove_leftovers()
            await host._lend_criu()
            host._profile = host._make_profile()
        except BaseException:
            os.close(host._lock)
            raise
        logger.info("containers are run", extra={"fields": {"engine": version, "network": chosen}})
        return host

    async def _remove_leftovers(self) -> None:
        for container in await self._engine.labelled(self._label):
            logger.warning("removed a container that a former gpufn left", extra={"fields": {"id": container[:12]}})
            await self._engine.remove(container)
        for home in (self._state / "replicas").glob("*"):
            remove_tree(home)

    async def _lend_criu(self) -> None:
        folder = self._state / "criu"
        why_not = await asyncio.to_thread(lend, folder)
        if why_not:
            logger.info("no CRIU is lent to containers of ordinary users", extra={"fields": {"why": why_not}})
        self._lent = None if why_not else folder

    # Images -------------------------------------------------------------------------------------

    async def look(self, reference: str, latest: bool = True) -> None:
        """Find out what an image says of itself: the one that its registry has now under that name, or without
        `latest` the one that is here.

        Raises `NotFound` where there is no such image, `ConfigError` where it is no function's of ours.
        """
        image = await self._found(reference, latest)
        _config_of(reference, image)
        self._images[reference] = image

    async def _found(self, reference: str, latest: bool) -> Image:
        """A tag may have moved since the engine fetched it. What was made here, and what a digest names, stays."""
        try:
            here = await self._engine.image(reference)
        except NotFound:
            await self._engine.pull(reference)
            return await self._engine.image(reference)
        if not latest or not here.origins or "@" in reference:
            return here
        try:
            await self._engine.pull(reference)
        except AdapterError as error:
            fields = {"image": reference, "why": error.why or error.message}
            logger.warning("its registry was not asked: the image that is here is used", extra={"fields": fields})
            return here
        return await self._engine.image(reference)

    def origin(self, reference: str) -> str:
        """Registry, repository and digest of the image that was looked at; empty where it came from none."""
        repository = name_and_tag(reference)[0]
        origins = self._images[reference].origins
        return next((text for text in origins if text.partition("@")[0] == repository), "")

    def config(self, reference: str) -> tuple[dict[str, Any], str]:
        """The tables of the `gpufn.toml` that an image carries, and what to call them. Raises `NotFound`."""
        if reference not in self._images:
            raise NotFound(
                f"There is no image {reference} on this machine.",
                hint=f"Build it, or fetch it with: docker pull {reference}",
                code="image-unknown",
            )
        return _config_of(reference, self._images[reference]), f"{CONFIG_LABEL} of {reference}"

    async def prepare(self, deployment: Deployment) -> None:
        check_deployment(deployment)
        if deployment.image not in self._images:  # else the deploy has looked
            await self.look(deployment.image)
        await self._fetch_snapshots(deployment)

    async def _fetch_snapshots(self, deployment: Deployment) -> None:
        """Of exactly this image, from the registry that it came from; once in our life for each function."""
        wanted = (deployment.key, self._images[deployment.image].id)
        origin = self.origin(deployment.image)
        if not origin or not self._gives_rights or deployment.spec.process_snapshot == "off" or wanted in self._fetched:
            return
        self._fetched.add(wanted)
        found = await fetch_snapshots(origin, self._snapshots, deployment.key, deployment.spec.tenant)
        if found:
            logger.info("snapshots are here", extra={"fields": {"function": deployment.key, "image": origin}})

    # Replicas -----------------------------------------------------------------------------------

    async def start(self, deployment: Deployment, sink: EventSink, devices: tuple[str, ...] = ()) -> ContainerReplica:
        image = self._image_of(deployment)
        if self._closing:
            raise Unavailable("This host is shutting down.", code="closing")
        identity = f"{deployment.name}-{secrets.token_hex(8)}"
        home = self._state / "replicas" / identity
        line = Line(home / "line")
        listener = listen("127.0.0.1", 0)
        try:
            orders = self._orders(deployment, image, identity, devices)
            mounts = await self._mounts(deployment, image, home)
            if deployment.secrets:
                mounts.append(_mount(self._copy_secrets(deployment, home), SECRETS_PATH, read_only=True))
            container = await self._create(identity, deployment, image, mounts, devices, network=self._network)
        except BaseException:
            listener.close()
            line.close()
            remove_tree(home)
            raise
        log = ReplicaLog(self.log_path(deployment), identity, self._logs, echo=self._echo)
        replica = ContainerReplica(
            identity, deployment, listener.getsockname()[1], self._engine, container, home, line, log,
            sink=sink, on_ended=self._ended, on_due=_not_beside if devices else self._snapshot_is_due,
        )  # fmt: skip
        self._replicas[identity] = replica
        replica.watch(orders, listener)
        return replica

    def _image_of(self, deployment: Deployment) -> Image:
        image = self._images.get(deployment.image)
        if image is None:
            raise NotFound(f"{deployment.key} is not prepared yet.", code="not-prepared")
        return image

    def _orders(
        self, deployment: Deployment, image: Image, identity: str, devices: Sequence[str] = ()
    ) -> dict[str, str]:
        """The variables that a container adds to its image's: the deployment's, and ours over them."""
        settings = replace(
            settings_of(deployment, devices), replica=identity, snapshot_dir=SNAPSHOT_PATH, snapshot_by="host"
        )
        own = dict(deployment.env)
        path = os.pathsep.join(p for p in (own.get("PYTHONPATH", ""), image.environment.get("PYTHONPATH", "")) if p)
        gpus = {} if devices else {"CUDA_VISIBLE_DEVICES": ""}  # a container sees no GPU that it was not given
        more = {"PYTHONPATH": path} if path else {}
        if self._lends_criu(image):
            more[ENV_CRIU] = f"{_LENT_CRIU}/criu"
        return {**own, **more, **gpus, "HOSTNAME": identity, **_said(settings)}

    async def _create(
        self,
        name: str,
        deployment: Deployment,
        image: Image,
        mounts: Sequence[Mapping[str, Any]],
        devices: Sequence[str] = (),
        *,
        network: str,
        confined: bool = True,
    ) -> str:
        """A container of ours that waits for its orders once it runs; returns its id."""

        def config() -> dict[str, Any]:
            security = [f"seccomp={self._profile if confined else 'unconfined'}"]
            if _is_root(image):  # others have CRIU's right from its file, which this would forbid
                security.append("no-new-privileges")
            label, _, host = self._label.partition("=")
            return {
                "Image": image.id,
                "Env": [f"{STANDBY_VARIABLE}={_FOLDER}/host"],
                "Labels": {label: host, _FUNCTION_LABEL: deployment.key, _REPLICA_LABEL: name},
                "HostConfig": {
                    "NetworkMode": network,
                    "CapDrop": ["ALL"],
                    "CapAdd": [RESTORE_RIGHT] if self._gives_rights else [],
                    "SecurityOpt": security,
                    "Mounts": list(mounts),
                    "LogConfig": {"Type": "none"},
                    **self._gpus(devices),
                },
            }

        try:
            return await self._engine.create(name, config())
        except AdapterError as error:
            if not self._gives_rights or RESTORE_RIGHT not in error.why:
                raise
            self._gives_rights = False
            fields = {"why": error.why}
            logger.warning("this engine gives no right to restore: functions load anew", extra={"fields": fields})
            return await self._engine.create(name, config())

    def _make_profile(self) -> str:
        """As the engine wants it: Docker the profile itself, Podman a file with it."""
        text = json.dumps(profile())
        if not self._podman:
            return text
        path = self._state / "seccomp.json"
        write_whole(path, text.encode())
        return str(path.resolve())

    def _gpus(self, devices: Sequence[str]) -> dict[str, Any]:
        """By UUID. Docker asks NVIDIA's runtime, Podman its CDI files. Not run on a machine with a GPU yet."""
        if not devices:
            return {}
        if self._podman:
            named = [f"nvidia.com/gpu={device}" for device in devices]
            return {"Devices": [{"PathOnHost": name, "PathInContainer": "", "CgroupPermissions": ""} for name in named]}
        return {"DeviceRequests": [{"Driver": "nvidia", "DeviceIDs": list(devices), "Capabilities": [["gpu"]]}]}

    def _copy_secrets(self, deployment: Deployment, home: Path) -> Path:
        """For one container, whatever user it runs as: the folder above is ours alone."""
        target = home / "secrets"
        target.mkdir(mode=0o755)
        target.chmod(0o755)
        copy_secrets(self._state, deployment, target)
        for name in deployment.secrets:
            (target / name).chmod(0o444)
        return target

    async def _mounts(self, deployment: Deployment, image: Image, home: Path) -> list[dict[str, Any]]:
        """What every container of a function sees of ours."""
        mounts = [_mount(home / "line", _FOLDER, read_only=True), await self._show_snapshots(deployment, image)]
        if self._lends_criu(image):
            assert self._lent is not None
            mounts.append(_mount(self._lent, _LENT_CRIU, read_only=True))
        return mounts

    def _lends_criu(self, image: Image) -> bool:
        return self._lent is not None and not _is_root(image)

    async def _show_snapshots(self, deployment: Deployment, image: Image) -> dict[str, Any]:
        """The folder of this function's snapshots, where a container looks for it. It belongs to the image's user."""
        place = Path(deployment.spec.tenant) / f"{deployment.name}.{deployment.namespace}"
        folder = self._snapshots / place
        for path in (self._snapshots, folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0 and not _is_root(image):
            if image.id not in self._users:
                self._users[image.id] = await self._user_of(image)
            user, group = self._users[image.id]
            await asyncio.to_thread(_give_to, folder, user, group)  # what was pulled is root's until now
        return _mount(folder, f"{SNAPSHOT_PATH}/{place}")

    async def _user_of(self, image: Image) -> tuple[int, int]:
        """Numbers of the user and group that an image runs as: names are those of its own files."""
        user, _, group = image.user.partition(":")
        if user.isdecimal() and (group.isdecimal() or not group):
            return int(user), int(group or user)
        container = await self._engine.create(f"look-{secrets.token_hex(8)}", {"Image": image.id, "Cmd": ["true"]})
        try:
            lines = (await self._engine.file(container, "/etc/passwd")).decode(errors="replace").splitlines()
        finally:
            await self._engine.remove(container)
        for words in (line.split(":") for line in lines):
            if len(words) > 3 and user in (words[0], words[2]):
                return int(words[2]), int(words[3])
        raise ConfigError(
            f"The image runs as {image.user}, whom it does not know.",
            why="Its /etc/passwd has no such user.",
            hint="Build it anew with a user that is there, or with numbers: USER 1000:1000",
            code="user-unknown",
        )

    def _ended(self, replica: ContainerReplica) -> None:
        self._replicas.pop(replica.id, None)

    # Snapshots ----------------------------------------------------------------------------------

    def _snapshot_is_due(self, replica: ContainerReplica) -> None:
        key = replica.deployment.key
        if self._closing or not self._gives_rights or key in self._snapshotting:
            return
        self._snapshotting.add(key)
        self._background.run(self._snapshot_beside(replica))

    async def _snapshot_beside(self, replica: ContainerReplica) -> None:
        empty = {"reason": "", "key": "", "bytes": 0, "seconds": 0}
        replica.tell_snapshot({**empty, "state": "building"}, time.time_ns())
        news: dict[str, Any] = {**empty, "state": "published"}
        try:
            news.update(await self.take_snapshot(replica.deployment))
        except AdapterError as error:
            reason = f"{error.message} {error.why}".strip()
            state = "skipped" if error.code in {"snapshot-busy", "criu-missing"} else "failed"
            news.update(state=state, code=error.code, reason=reason)
        except OSError as error:
            news.update(state="failed", code="os-error", reason=str(error))
        finally:
            self._snapshotting.discard(replica.deployment.key)
        replica.tell_snapshot(news, time.time_ns())

    async def take_snapshot(self, deployment: Deployment) -> dict[str, Any]:
        """Take the snapshots of a prepared function in a container that serves nobody.

        Its result: ``{"key", "bytes", "copied_bytes", "seconds"}``. Raises `SnapshotError`, `Conflict` as
        `adapter.hosts.snapshotter` does.
        """
        image = self._image_of(deployment)
        identity = f"snapshot-{deployment.name}-{secrets.token_hex(8)}"
        home = self._state / "replicas" / identity
        line = Line(home / "line")
        try:
            mounts = await self._mounts(deployment, image, home)
            container = await self._create(identity, deployment, image, mounts, network="none", confined=False)
            if not self._gives_rights:
                await self._engine.remove(container)
                raise SnapshotError(
                    "No snapshot can be taken here.",
                    why=f"The container engine does not know the capability {RESTORE_RIGHT}.",
                    hint="Use a newer engine: Docker 26.1 and Podman 4.3 give it.",
                    code="no-rights",
                )
            own = {TASK_VARIABLE: TASK_SNAPSHOT, "GPUFN_RUNTIME_DIR": "/tmp"}  # noqa: S108  # of its container
            orders = {**self._orders(deployment, image, identity), **own}
            try:
                return await self._follow_snapshotter(deployment, identity, container, line, orders)
            finally:
                await self._engine.remove(container)
        finally:
            line.close()
            remove_tree(home)

    async def _follow_snapshotter(
        self, deployment: Deployment, identity: str, container: str, line: Line, orders: Mapping[str, str]
    ) -> dict[str, Any]:
        log = ReplicaLog(self.log_path(deployment), identity, self._logs, echo=self._echo)

        async def keep(output: Any) -> None:
            async for data in output:
                log.feed(data)

        async def listen_to() -> bytes:
            await line.give_orders(orders)
            said = b""
            while data := await line.read():
                said = (said + data)[-_RESULT_LIMIT_BYTES:]
            return said

        async with self._engine.output(container) as output:
            printing = asyncio.ensure_future(keep(output))
            hearing = asyncio.ensure_future(listen_to())
            try:
                await self._engine.start(container)
                code = await self._engine.wait(container)
                await asyncio.wait({printing, hearing}, timeout=_CLOSE_GRACE_S)
                return result_of(hearing.result() if hearing.done() else b"", code)
            finally:
                for task in (printing, hearing):
                    task.cancel()
                await asyncio.gather(printing, hearing, return_exceptions=True)
                log.close()

    # The rest of a host -------------------------------------------------------------------------

    async def inventory(self) -> Inventory:
        return await asyncio.to_thread(read_inventory)

    async def remove(self, deployment: Deployment) -> None:
        check_deployment(deployment)
        await self._logs.flush()
        path = self.log_path(deployment)
        for old in (path, path.with_name(path.name + ".1")):
            old.unlink(missing_ok=True)

    def log_path(self, deployment: Deployment) -> Path:
        """File of JSON lines ``{"timestamp", "instance", "text"}`` that all replicas of a function append to."""
        return self._state / "logs" / f"{deployment.key}.jsonl"

    def kill(self) -> None:
        """End every replica at once, whatever it does: for whoever cannot wait for `close`."""
        for replica in self._replicas.values():
            replica.kill()

    async def close(self) -> None:
        self._closing = True
        self._background.cancel()
        try:
            await self._background.join()
            await asyncio.gather(*(replica.stop(_CLOSE_GRACE_S) for replica in list(self._replicas.values())))
            await self._logs.close()
        finally:
            os.close(self._lock)


def _config_of(reference: str, image: Image) -> dict[str, Any]:
    """Raises `ConfigError` for an image that is not of this contract."""
    contract = image.labels.get(CONTRACT_LABEL)
    if contract != str(CONTRACT_VERSION):
        raise ConfigError(
            f"The image {reference} is no function that this gpufn can run.",
            why=f"Its contract is version {contract}, ours is {CONTRACT_VERSION}."
            if contract
            else f"It has no label {CONTRACT_LABEL}.",
            hint="Build it with gpufn build, pack or faas-cli, of this version.",
            code="image-foreign",
        )
    try:
        config = json.loads(image.labels.get(CONFIG_LABEL) or "{}")
        if isinstance(config, dict):
            return config
    except ValueError:
        pass
    raise ConfigError(f"The label {CONFIG_LABEL} of {reference} is no JSON object.", code="image-foreign")


def _not_beside(_replica: ContainerReplica) -> None:
    """Of a replica with a GPU none is taken: another container would need GPU memory that nobody granted."""


def _said(settings: ReplicaSettings) -> dict[str, str]:
    names = {name for name in ReplicaSettings.__dataclass_fields__ if name not in _IMAGE_SAYS}
    return settings.to_env(names)


def _give_to(folder: Path, user: int, group: int) -> None:
    """By descriptors: whoever lives in there may put a link in the place of a folder meanwhile, and take away files."""
    os.chown(folder, user, group)
    with suppress(RecursionError):  # no snapshot is nested so deeply: that is its user's own doing
        for _, folders, names, here in os.fwalk(folder):
            for name in (*folders, *names):
                with suppress(FileNotFoundError):
                    os.chown(name, user, group, dir_fd=here, follow_symlinks=False)


def _is_root(image: Image) -> bool:
    return image.user.partition(":")[0] in ("", "0", "root")


def _mount(source: Path, target: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(source.resolve()), "Target": target, "ReadOnly": read_only}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
