"""The process host: replicas as processes of this machine, each in a process-id namespace of its own.

    <state>/lock              held while a host runs; a second one is refused
    <state>/shim/adapter      link to this package: all that functions see of our environment
    <state>/replicas/<id>/    0700: process id, channel, secrets of one replica
    <state>/logs/             one file a function
    <state>/snapshots/, <state>/secrets/

Every replica hangs on a descriptor that only this process holds: when the host dies, however it dies,
its replicas drain and end by themselves. One entrypoint is always kept waiting for its orders
(a standby), so that a wake does not pay for starting an interpreter.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import adapter
from adapter.errors import AdapterError, Conflict, NotFound
from adapter.hosts import Deployment, EventSink, ReplicaState
from adapter.hosts.environment import Environments
from adapter.hosts.folders import FunctionFolders
from adapter.hosts.replica_log import ReplicaLog
from adapter.records import Event, EventName
from adapter.replica import STANDBY_VARIABLE, Command, ReplicaSettings, base_environment
from adapter.spec import read_handler_shape

logger = logging.getLogger(__name__)

_NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")
_STANDBY_DELAY_S = 0.3
"""After a start: its own wake comes first."""


class ProcessHost:
    """See `adapter.hosts.Host`. Make it inside a running event loop; close it when done."""

    def __init__(self, state: Path, folders: FunctionFolders, envs: Path | None = None) -> None:
        self._state = state
        self._folders = folders
        self._environments = Environments(envs or state / "envs")
        self._pythons: dict[str, Path] = {}
        self._replicas: dict[str, ProcessReplica] = {}
        self._standby: _Shell | None = None
        self._standby_timer: asyncio.TimerHandle | None = None
        self._closing = False
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock_state(state)
        _end_leftovers(state / "replicas")
        self._shim = _link_shim(state / "shim")
        self._wrapper = _NAMESPACES if _namespaces_work() else ()
        self._prepare_standby()

    async def prepare(self, deployment: Deployment) -> None:
        folder = self._folders.resolve(deployment.image)
        read_handler_shape(folder)
        self._pythons[deployment.image] = await asyncio.to_thread(self._environments.python_for, folder)

    async def start(self, deployment: Deployment, sink: EventSink) -> ProcessReplica:
        python = self._pythons.get(deployment.image)
        if python is None:
            raise NotFound(f"{deployment.key} is not prepared yet.", code="not-prepared")
        identity = f"{deployment.name}-{secrets.token_hex(4)}"
        home = self._state / "replicas" / identity
        home.mkdir(mode=0o700, parents=True)
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        try:
            settings = self._settings(deployment, identity, home, python)
            shell = self._take_standby() or _Shell(self._wrapper, self._shim)
            replica = ProcessReplica(identity, deployment, listener.getsockname()[1], shell, home, sink, self._ended)
            (home / "pid").write_text(json.dumps([shell.pid, _started_at(shell.pid)]))
            log = ReplicaLog(self.log_path(deployment), identity)
            replica.watch(log)
            environment = {
                **base_environment(os.environ),
                "HOSTNAME": identity,
                **dict(deployment.env),
                **settings.to_env(),
                "PYTHONPATH": str(self._shim),
            }
            shell.give_orders(environment, listener)
        finally:
            listener.close()
        self._replicas[identity] = replica
        self._schedule_standby()
        return replica

    def _settings(self, deployment: Deployment, identity: str, home: Path, python: Path) -> ReplicaSettings:
        spec = deployment.spec
        return ReplicaSettings(
            function=deployment.name,
            namespace=deployment.namespace,
            revision=deployment.revision,
            replica=identity,
            folder=str(self._folders.resolve(deployment.image)),
            python=str(python),
            runtime_dir=str(home),
            snapshot_dir=str(self._state / "snapshots"),
            secrets_dir=str(self._copy_secrets(deployment, home)),
            metrics_port=0,
            in_flight=spec.in_flight,
            queue=spec.queue,
            held=max(spec.queue, spec.in_flight) + 8,
            body_limit_bytes=spec.body_limit_bytes,
            start_timeout_s=spec.start_timeout_s,
            exec_timeout_s=spec.exec_timeout_s,
            process_snapshot=spec.process_snapshot,
            weight_snapshot=spec.weight_snapshot,
            snapshot_env=spec.snapshot_env,
            tenant=spec.tenant,
        )

    def _copy_secrets(self, deployment: Deployment, home: Path) -> Path:
        folder = home / "secrets"
        folder.mkdir(mode=0o700)
        for name in deployment.secrets:
            source = self._state / "secrets" / deployment.namespace / name
            try:
                value = source.read_bytes()
            except FileNotFoundError as exc:
                raise NotFound(
                    f"{deployment.key} needs the secret {name!r}, which does not exist.",
                    hint=f"faas-cli secret create {name} --from-file FILE",
                    code="secret-missing",
                ) from exc
            (folder / name).touch(mode=0o600)
            (folder / name).write_bytes(value)
        return folder

    async def remove(self, deployment: Deployment) -> None:
        path = self.log_path(deployment)
        for old in (path, path.with_name(path.name + ".1")):
            old.unlink(missing_ok=True)

    def log_path(self, deployment: Deployment) -> Path:
        return self._state / "logs" / f"{deployment.key}.jsonl"

    async def close(self) -> None:
        self._closing = True
        if self._standby_timer is not None:
            self._standby_timer.cancel()
        if self._standby is not None:
            self._standby.kill()
            self._standby.close()
        await asyncio.gather(*(replica.stop(10.0) for replica in list(self._replicas.values())))
        os.close(self._lock)

    def _ended(self, replica: ProcessReplica) -> None:
        self._replicas.pop(replica.id, None)

    # Standby ------------------------------------------------------------------------------------

    def _prepare_standby(self) -> None:
        self._standby_timer = None
        if self._standby is None and not self._closing:
            self._standby = _Shell(self._wrapper, self._shim)

    def _schedule_standby(self) -> None:
        if self._standby_timer is None and self._standby is None:
            self._standby_timer = asyncio.get_running_loop().call_later(_STANDBY_DELAY_S, self._prepare_standby)

    def _take_standby(self) -> _Shell | None:
        shell, self._standby = self._standby, None
        if shell is not None and not shell.is_alive:
            shell.close()
            return None
        return shell


class _Shell:
    """An entrypoint that waits for its orders: a process, its output, its events, and the line to it."""

    def __init__(self, wrapper: tuple[str, ...], shim: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        events_r, events_w = os.pipe()
        output_r, output_w = os.pipe()
        environment = {
            **base_environment(os.environ),
            "PYTHONPATH": str(shim),
            STANDBY_VARIABLE: f"{theirs.fileno()} {events_w}",
        }
        try:
            self._process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "adapter.runtime"],
                stdin=subprocess.DEVNULL,
                stdout=output_w,
                stderr=output_w,
                env=environment,
                pass_fds=(theirs.fileno(), events_w),
                start_new_session=True,
                cwd="/",
            )
        finally:
            theirs.close()
            os.close(events_w)
            os.close(output_w)
        self.line, self.events_fd, self.output_fd = ours, events_r, output_r
        for descriptor in (events_r, output_r):
            os.set_blocking(descriptor, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def give_orders(self, environment: Mapping[str, str], listener: socket.socket) -> None:
        socket.send_fds(self.line, [json.dumps(dict(environment)).encode() + b"\n"], [listener.fileno()])

    def say(self, command: bytes) -> None:
        with suppress(OSError):
            self.line.send(command)

    def kill(self) -> None:
        """The wrapper's end kills the namespace's first process, and that everything in it."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self.line.close()
        for descriptor in (self.events_fd, self.output_fd):
            os.close(descriptor)
        self._process.wait()


class ProcessReplica:
    """See `adapter.hosts.Replica`."""

    def __init__(
        self,
        identity: str,
        deployment: Deployment,
        port: int,
        shell: _Shell,
        home: Path,
        sink: EventSink,
        ended: object,
    ) -> None:
        self.id = identity
        self.deployment = deployment
        self.host = "127.0.0.1"
        self.port = port
        self.state = ReplicaState.STARTING
        self.building_snapshot = False
        self._shell = shell
        self._home = home
        self._sink = sink
        self._on_ended = ended
        self._events_rest = b""
        self._open = 2
        self._gone = asyncio.Event()

    @property
    def pid(self) -> int:
        """Of the outermost process; killing it ends the replica."""
        return self._shell.pid

    def watch(self, log: ReplicaLog) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._shell.events_fd, self._read_events)
        loop.add_reader(self._shell.output_fd, self._read_output, log)

    def park(self) -> None:
        self._shell.say(Command.PARK)

    async def stop(self, grace_s: float) -> None:
        if self.state is not ReplicaState.GONE:
            self.state = ReplicaState.STOPPING
            self._shell.say(Command.STOP)
        try:
            await asyncio.wait_for(self._gone.wait(), grace_s)
        except (TimeoutError, asyncio.TimeoutError):
            self._shell.kill()
            await self._gone.wait()

    def kill(self) -> None:
        """At once, without a drain: for tests and for replicas that do not answer."""
        self._shell.kill()

    def _read_output(self, log: ReplicaLog) -> None:
        data = _read(self._shell.output_fd)
        if data is None:
            return
        if data:
            log.feed(data)
        else:
            log.close()
            self._stream_ended(self._shell.output_fd)

    def _read_events(self) -> None:
        data = _read(self._shell.events_fd)
        if data is None:
            return
        if not data:
            self._stream_ended(self._shell.events_fd)
            return
        *lines, self._events_rest = (self._events_rest + data).split(b"\n")
        for line in lines:
            try:
                event = Event.from_line(line)
            except ValueError:
                logger.warning("a replica said something else than an event", extra={"fields": {"replica": self.id}})
                continue
            self._take(event)

    def _take(self, event: Event) -> None:
        if event.name is EventName.STOPPED:
            return  # said once, by us, when nothing of it is left
        if event.name is EventName.SNAPSHOT:
            self.building_snapshot = event.fields.get("state") == "building"
        elif self.state is not ReplicaState.STOPPING:
            if event.name is EventName.SERVING:
                self.state = ReplicaState.SERVING
            elif event.name is EventName.PARKED:
                self.state = ReplicaState.PARKED
            elif event.name in (EventName.FAILED, EventName.MODEL_EXITED):
                self.state = ReplicaState.STARTING
        self._sink(self, event)

    def _stream_ended(self, descriptor: int) -> None:
        """When events and output have both ended, no process of the replica is left that could write either."""
        asyncio.get_running_loop().remove_reader(descriptor)
        self._open -= 1
        if self._open:
            return
        self.state = ReplicaState.GONE
        self.building_snapshot = False
        self._shell.kill()
        self._shell.close()
        shutil.rmtree(self._home, ignore_errors=True)
        self._on_ended(self)  # type: ignore[operator]
        self._gone.set()
        self._sink(self, Event(EventName.STOPPED, 0))


def _read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return None


def _lock_state(state: Path) -> int:
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


def _namespaces_work() -> bool:
    try:
        done = subprocess.run([*_NAMESPACES, "true"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    except OSError:
        return False
    if done.returncode:
        logger.warning("no process-id namespaces here: functions start without process snapshots")
    return done.returncode == 0


def _started_at(pid: int) -> str:
    """When a process started, in the kernel's ticks: with it a process id names one process only."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def _end_leftovers(folder: Path) -> None:
    """Kill what a host that was killed may have left, before its replicas noticed; remove their folders."""
    for home in folder.glob("*"):
        with suppress(OSError, ValueError, AdapterError):
            pid, started_at = json.loads((home / "pid").read_text())
            if _started_at(pid) == started_at:
                os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)
