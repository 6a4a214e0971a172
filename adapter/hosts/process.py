"""The process host: replicas as processes of this machine, each in a process-id namespace of its own.

    <state>/lock              held while a host runs; a second one is refused
    <state>/shim/adapter      link to this package: all that functions see of our environment
    <state>/replicas/<id>/    0700: process id, channel, secrets of one replica. They go with it; after a kill -9
                              of the host, when the next host on this folder begins
    <state>/logs/             one file a function
    <state>/gpu/              what was found to work on the GPUs, where there are some
    <state>/snapshots/, <state>/secrets/, <state>/envs/

Every replica hangs on a descriptor that only this process holds: when the host dies, however it dies,
its replicas drain and end by themselves. One entrypoint is always kept waiting for its orders
(a standby), so that a wake does not pay for starting an interpreter.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import adapter
from adapter.errors import ConfigError, Conflict, NotFound, Unavailable
from adapter.hosts import Deployment, EventSink, Inventory, LocalHost
from adapter.hosts.capabilities import Trial
from adapter.hosts.environment import Environments
from adapter.hosts.folders import FunctionFolders
from adapter.hosts.gpu_helper import GpuHelper
from adapter.hosts.inventory import read_inventory
from adapter.hosts.ports import listen
from adapter.hosts.process_replica import ProcessReplica
from adapter.hosts.replica_log import LogWriter, ReplicaLog
from adapter.hosts.shell import Isolation, Shell, end_leftovers
from adapter.hosts.snapshotter import take_snapshot
from adapter.keys import ENV_CRIU, ENV_PREFIX, SECRETS_PATH
from adapter.replica import WATCHDOG_VARIABLES, ReplicaSettings, base_environment
from adapter.spec import read_handler_shape

logger = logging.getLogger(__name__)

_STANDBY_DELAY_S = 0.3
"""After a start: its own wake comes first."""

_CLOSE_GRACE_S = 10.0
_PATH_PART = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_ENVIRONMENT_LIMIT_BYTES = 96 * 1024
"""Of a deployment: no single variable may be larger (MAX_ARG_STRLEN is 128 KiB), and orders never block."""


class ProcessHost(LocalHost):
    """See `adapter.hosts.Host`. Make it inside a running event loop; close it when done.

    `envs` and `snapshots` are folders to share with other hosts; `python` is an interpreter to use for every
    function instead of building environments; `port` is where replicas listen (0: each where it is free);
    `echo` gets what functions print, as it comes.
    """

    def __init__(
        self,
        state: Path,
        folders: FunctionFolders,
        envs: Path | None = None,
        *,
        snapshots: Path | None = None,
        python: Path | None = None,
        port: int = 0,
        echo: TextIO | None = None,
    ) -> None:
        self._state = state
        self._folders = folders
        self._environments = Environments(envs or state / "envs")
        self._snapshots = snapshots or state / "snapshots"
        self._python = python
        self._port = port
        self._echo = echo
        self._pythons: dict[str, Path] = {}
        self._replicas: dict[str, ProcessReplica] = {}
        self._standby: Shell | None = None
        self._standby_timer: asyncio.TimerHandle | None = None
        self._gpu_helper: GpuHelper | None = None
        self._gpu_trial: Trial | None = None
        self._closing = False
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = lock_state(state)
        self._logs = LogWriter()
        end_leftovers(state / "replicas")
        self._shim = _link_shim(state / "shim")
        self._isolation = Isolation.find()
        if not self._isolation.wrapper:
            fields = {"reason": self._isolation.why_not}
            logger.warning("no namespaces here: functions start without process snapshots", extra={"fields": fields})
        self._prepare_standby()

    async def prepare(self, deployment: Deployment) -> None:
        check_deployment(deployment)
        folder = self._folders.resolve(deployment.image)
        read_handler_shape(folder)
        python = self._python
        if python is None:
            python = await asyncio.to_thread(self._environments.python_for, folder)
        self._pythons[deployment.image] = python

    async def start(self, deployment: Deployment, sink: EventSink, devices: tuple[str, ...] = ()) -> ProcessReplica:
        python = self._python_for(deployment)
        if self._closing:
            raise Unavailable("This host is shutting down.", code="closing")
        folder = self._folders.resolve(deployment.image)
        listener = listen("127.0.0.1", self._port)
        shell = None
        try:
            shell = self._take_standby() or self._new_shell()
            orders = self._orders(shell, deployment, folder, python, devices)
            shell.give_orders(environment_of(deployment, orders, self._shim, devices), listener)
            port = listener.getsockname()[1]
            replica = self._replica(shell, deployment, orders.replica, port, sink)
        except BaseException:
            if shell is not None:
                shell.close()
            raise
        finally:
            listener.close()
            self._schedule_standby()
        self._replicas[replica.id] = replica
        replica.watch()
        return replica

    def _orders(
        self, shell: Shell, deployment: Deployment, folder: Path, python: Path, devices: Sequence[str]
    ) -> ReplicaSettings:
        """What turns a waiting shell into a replica of `deployment`."""
        return replace(
            settings_of(deployment, devices),
            replica=f"{deployment.name}-{shell.home.name}",
            folder=str(folder),
            python=str(python),
            runtime_dir=str(shell.home),
            snapshot_dir=str(self._snapshots),
            secrets_dir=self._copy_secrets(deployment, shell),
            gpu_helper=self._gpu_helper.path if self._gpu_helper is not None and devices else "",
            gpu_capabilities=str(self._gpu_trial.path) if self._gpu_trial is not None and devices else "",
        )

    def _replica(
        self, shell: Shell, deployment: Deployment, identity: str, port: int, sink: EventSink
    ) -> ProcessReplica:
        log = ReplicaLog(self.log_path(deployment), identity, self._logs, echo=self._echo)
        return ProcessReplica(identity, deployment, port, shell, log, sink=sink, on_ended=self._ended)

    async def inventory(self) -> Inventory:
        found = await asyncio.to_thread(read_inventory)
        if found.devices and self._gpu_helper is None:
            self._gpu_helper = GpuHelper()
            self._gpu_trial = Trial(self._state / "gpu")
        return found

    def _copy_secrets(self, deployment: Deployment, shell: Shell) -> str:
        """Copy the secrets for one replica; returns where its handler finds them: at OpenFaaS's path if possible."""
        shown = self._isolation.shows_secrets
        target = shell.shown if shown else shell.home / "secrets"
        target.mkdir(mode=0o700, exist_ok=True)
        copy_secrets(self._state, deployment, target)
        return SECRETS_PATH if shown else str(target)

    async def take_snapshot(self, deployment: Deployment) -> dict[str, Any]:
        """Take the snapshots of a prepared function without starting a replica: see `hosts.snapshotter`.

        Raises what that raises, and `ConfigError` where no replica would start from them.
        """
        python, folder = self._python_for(deployment), self._folders.resolve(deployment.image)
        if not _takes_snapshots(deployment, folder):
            raise ConfigError(
                f"{deployment.key} would not start from a process snapshot.",
                why=f"Its setting is {deployment.spec.process_snapshot!r}; 'auto' means: where `load` is defined.",
                hint="Move what is slow into load(device), or set [snapshot] process in gpufn.toml.",
                code="snapshots-off",
            )
        settings = replace(
            settings_of(deployment), folder=str(folder), python=str(python), snapshot_dir=str(self._snapshots)
        )
        return await take_snapshot(self._isolation, environment_of(deployment, settings, self._shim), self._echo)

    def _python_for(self, deployment: Deployment) -> Path:
        python = self._pythons.get(deployment.image)
        if python is None:
            raise NotFound(f"{deployment.key} is not prepared yet.", code="not-prepared")
        return python

    async def remove(self, deployment: Deployment) -> None:
        check_deployment(deployment)
        await self._logs.flush()
        path = self.log_path(deployment)
        for old in (path, path.with_name(path.name + ".1")):
            old.unlink(missing_ok=True)

    def log_path(self, deployment: Deployment) -> Path:
        """File of JSON lines ``{"timestamp", "instance", "text"}`` that all replicas of a function append to."""
        return self._state / "logs" / f"{deployment.key}.jsonl"

    async def close(self) -> None:
        self._closing = True
        if self._standby_timer is not None:
            self._standby_timer.cancel()
        if self._standby is not None:
            self._standby.close()
            self._standby = None
        self._environments.interrupt()
        try:
            await asyncio.gather(*(replica.stop(_CLOSE_GRACE_S) for replica in list(self._replicas.values())))
            await self._logs.close()
        finally:
            if self._gpu_trial is not None:
                await self._gpu_trial.close()
            if self._gpu_helper is not None:
                self._gpu_helper.close()
            os.close(self._lock)

    def kill(self) -> None:
        """End every replica at once, whatever it does: for whoever cannot wait for `close`."""
        for replica in self._replicas.values():
            replica.kill()

    def _ended(self, replica: ProcessReplica) -> None:
        self._replicas.pop(replica.id, None)

    # Standby ------------------------------------------------------------------------------------

    def _new_shell(self) -> Shell:
        return Shell(self._isolation, self._shim, self._state / "replicas" / secrets.token_hex(8))

    def _prepare_standby(self) -> None:
        self._standby_timer = None
        if self._standby is None and not self._closing:
            try:
                self._standby = self._new_shell()
            except OSError as exc:  # no process or descriptor to spare: the next start will say so
                logger.warning("no entrypoint is standing by", extra={"fields": {"reason": str(exc)}})

    def _schedule_standby(self) -> None:
        if self._standby_timer is None and self._standby is None:
            self._standby_timer = asyncio.get_running_loop().call_later(_STANDBY_DELAY_S, self._prepare_standby)

    def _take_standby(self) -> Shell | None:
        shell, self._standby = self._standby, None
        if shell is not None and not shell.is_alive:
            shell.close()
            return None
        return shell


def copy_secrets(state: Path, deployment: Deployment, target: Path) -> None:
    """The deployment's secrets out of a state folder, each a file (0600) in `target`. Raises `NotFound`."""
    for name in deployment.secrets:
        try:
            value = (state / "secrets" / deployment.namespace / name).read_bytes()
        except FileNotFoundError as exc:
            raise NotFound(
                f"{deployment.key} needs the secret {name!r}, which does not exist.",
                why=f"The namespace {deployment.namespace} has no secret of that name.",
                hint=f"faas-cli secret create {name} --namespace {deployment.namespace} --from-file FILE",
                code="secret-missing",
            ) from exc
        (target / name).touch(mode=0o600)
        (target / name).write_bytes(value)


def settings_of(deployment: Deployment, devices: Sequence[str] = ()) -> ReplicaSettings:
    """What a deployment asks for, on these GPUs, without what belongs to one replica. Raises `ConfigError`."""
    spec = deployment.spec
    asked = {name: value for name, value in deployment.env if name in WATCHDOG_VARIABLES}
    settings = replace(
        ReplicaSettings.from_env(asked),
        function=deployment.name,
        namespace=deployment.namespace,
        revision=deployment.revision,
        metrics_port=0,  # the gateway's are the metrics here
        queue=spec.queue,
        held=max(spec.queue, spec.in_flight) + 8,
        body_limit_bytes=spec.body_limit_bytes,
        start_timeout_s=spec.start_timeout_s,
        process_snapshot=spec.process_snapshot,
        weight_snapshot=spec.weight_snapshot,
        device="cuda:0" if devices else "" if spec.gpus else "cpu",  # a replica numbers its GPUs from zero
        resume="asked" if devices else "held",
        snapshot_env=spec.snapshot_env,
        tenant=spec.tenant,
    )
    if "max_inflight" not in asked:
        settings = replace(settings, in_flight=spec.in_flight)
    if "exec_timeout" not in asked:
        settings = replace(settings, exec_timeout_s=spec.exec_timeout_s)
    if "write_timeout" not in asked and settings.exec_timeout_s:  # a drain lets a request have its time
        settings = replace(settings, write_timeout_s=settings.exec_timeout_s)
    return settings


def environment_of(
    deployment: Deployment, settings: ReplicaSettings, shim: Path, devices: Sequence[str] = ()
) -> dict[str, str]:
    """All variables of a replica: the machine's, the deployment's over them, and ours over both."""
    own = dict(deployment.env)
    path = os.pathsep.join(part for part in (str(shim), own.get("PYTHONPATH", "")) if part)
    passed_on = {name: os.environ[name] for name in (ENV_CRIU, "XDG_DATA_HOME") if name in os.environ}
    if devices or not deployment.spec.gpus:  # a replica sees no GPU that it was not given
        passed_on["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return {
        **base_environment(os.environ),
        "HOSTNAME": settings.replica,
        **own,
        **settings.to_env(),
        **passed_on,
        "PYTHONPATH": path,
    }


def _takes_snapshots(deployment: Deployment, folder: Path) -> bool:
    wanted = deployment.spec.process_snapshot
    return wanted == "on" or (wanted == "auto" and read_handler_shape(folder).has_load)


def check_deployment(deployment: Deployment) -> None:
    """Raises `ConfigError` for names that would leave our folders and variables that a replica cannot have."""
    for what, name in (
        ("function name", deployment.name),
        ("namespace", deployment.namespace),
        *(("secret name", secret) for secret in deployment.secrets),
    ):
        if not _PATH_PART.fullmatch(name) or ".." in name:
            raise ConfigError(
                f"The {what} {name!r} cannot be used.",
                why="It would name a file.",
                hint="Use letters, digits, and - _ . between them.",
                code="bad-name",
            )
    size = 0
    for name, value in deployment.env:
        size += len(name.encode()) + len(value.encode())
        if not name or "=" in name or "\0" in name + value or name.startswith(ENV_PREFIX):
            raise ConfigError(
                f"The variable {name!r} of {deployment.key} cannot be used.",
                why=f"Names that start with {ENV_PREFIX} are gpufn's own; none may be empty or hold = or a null byte.",
                hint="Rename it.",
                code="bad-variable",
            )
    if size > _ENVIRONMENT_LIMIT_BYTES:
        raise ConfigError(
            f"The environment of {deployment.key} is too large.",
            why=f"It has {size} bytes, and {_ENVIRONMENT_LIMIT_BYTES} are allowed.",
            hint="Put large values into a file of the function, or into a secret.",
            code="environment-too-large",
        )
    settings_of(deployment)


def lock_state(state: Path) -> int:
    fd = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = os.read(fd, 32).decode() or "unknown"
        os.close(fd)
        raise Conflict(
            f"Another gpufn uses the state folder {state}.",
            why=f"Its process id is {holder}.",
            hint="Stop it, or choose another folder with --state.",
            code="state-in-use",
        ) from exc
    os.ftruncate(fd, 0)
    os.write(fd, str(os.getpid()).encode())
    return fd


def _link_shim(folder: Path) -> Path:
    """A folder that holds only a link to this package, for the path of functions' interpreters."""
    folder.mkdir(mode=0o700, exist_ok=True)
    package = Path(adapter.__file__).parent
    link = folder / package.name
    if not link.is_symlink() or link.readlink() != package:
        fresh = folder / f".{secrets.token_hex(4)}"
        fresh.symlink_to(package)
        fresh.replace(link)
    return folder
