"""`gpufn run`: one function here, without a gateway, until Ctrl-C."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from adapter.cli.news import skipped_news, snapshot_news
from adapter.cli.output import Column, format_table, note, progress, warn
from adapter.cli.state import state_folder, state_option
from adapter.errors import AdapterError, ConfigError, HandlerError
from adapter.hosts import Deployment, Replica
from adapter.keys import HANDLER_FILE
from adapter.records import Event, EventName, StartRecord
from adapter.units import format_duration

if TYPE_CHECKING:
    from adapter.hosts.process import ProcessHost

_STOP_GRACE_S = 10.0
_Command = TypeVar("_Command", bound=Callable[..., Any])


def function_options(command: _Command) -> _Command:
    """Adds ``--env``, ``--python``, ``--envs`` and ``--state``: how a function in a folder is brought up."""
    for option in (
        state_option,
        click.option(
            "--envs", type=click.Path(path_type=Path),
            help="Folder of Python environments. Default: in the state folder.",
        ),
        click.option(
            "--python", type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Interpreter that has the function's packages. Default: an environment made from requirements.txt.",
        ),
        click.option(
            "-e", "--env", "variables", multiple=True, metavar="NAME=VALUE",
            help="Variable of the function; repeatable.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path())
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@function_options
def command(
    folder: Path, port: int, variables: tuple[str, ...], python: Path | None, envs: Path | None, state: Path | None
) -> int:
    """Run the function in FOLDER (default: here), without a gateway, until Ctrl-C.

    It is started as `gpufn up` starts it, snapshots included; what it prints comes to standard error.
    """
    folder = folder.resolve()
    os.umask(0o077)
    return asyncio.run(_Run(folder, deployment_of(folder, variables), port).run(state_folder(state), envs, python))


def deployment_of(folder: Path, variables: tuple[str, ...], namespace: str = "openfaas-fn") -> Deployment:
    """The function in `folder` as its own `gpufn.toml` says, with ``NAME=VALUE`` variables.

    Raises `ConfigError`, and `HandlerError` where functions are in folders of `folder`.
    """
    from adapter.spec import parse_spec, read_config

    _require_handler(folder)
    pairs = [text.partition("=") for text in variables]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError(
                f"--env {name} has no value.",
                why="It is written NAME=VALUE.",
                hint=f"Try: --env {name}=",
                code="bad-variable",
            )
    spec = parse_spec(read_config(folder), {})
    env = tuple((name, value) for name, _, value in pairs)
    return Deployment(folder.name, namespace, "run", folder.name, spec, env)


def _require_handler(folder: Path) -> None:
    """Raises `HandlerError` for a folder of functions; one with nothing in it is the host's to refuse."""
    inside = [] if (folder / HANDLER_FILE).is_file() else sorted(folder.glob(f"*/{HANDLER_FILE}"))
    if inside:
        raise HandlerError(
            f"{folder} is no function folder.",
            why=f"It has no {HANDLER_FILE}. Folders in it that have one: {', '.join(p.parent.name for p in inside)}.",
            hint=f"Name one, such as: {os.path.relpath(inside[0].parent)}",
            code="handler-missing",
        )


@asynccontextmanager
async def open_host(
    folder: Path, state: Path, envs: Path | None, python: Path | None, *, port: int = 0, echo: TextIO | None = None
) -> AsyncIterator[ProcessHost]:
    """A host for the function in `folder` alone, beside a `gpufn up`: environments and snapshots are shared.

    `echo` gets what the function prints. Nothing else of the host is left when it is closed.
    """
    from adapter.hosts.folders import FunctionFolders
    from adapter.hosts.process import ProcessHost

    home = state / "run" / hashlib.blake2b(os.fsencode(folder), digest_size=4).hexdigest()
    host = ProcessHost(
        home,
        FunctionFolders([folder]),
        envs or state / "envs",
        snapshots=state / "snapshots",
        python=python.absolute() if python else None,  # not resolved: an environment's is a link to another
        port=port,
        echo=echo,
    )
    try:
        yield host
    finally:
        await host.close()
        shutil.rmtree(home, ignore_errors=True)
        with suppress(OSError):  # others run beside us
            home.parent.rmdir()


class _Run:
    """One run of `gpufn run`: a host with one replica."""

    def __init__(self, folder: Path, deployment: Deployment, port: int) -> None:
        self._folder = folder
        self._deployment = deployment
        self._port = port
        self._over = asyncio.Event()
        self._signal: signal.Signals | None = None
        self._error: AdapterError | None = None

    async def run(self, state: Path, envs: Path | None, python: Path | None) -> int:
        """Exit code: 128 + signal after Ctrl-C or SIGTERM. Raises the error that ended the function."""
        self._watch_signals()
        async with open_host(self._folder, state, envs, python, port=self._port, echo=sys.stderr) as host:
            await self._run_on(host)
        if self._error is not None:
            raise self._error
        if self._signal is None:
            return 1
        note("✓ stopped")
        return 128 + self._signal

    async def _run_on(self, host: ProcessHost) -> None:
        with progress("Environment"):
            await self._unless_over(host.prepare(self._deployment))
        if self._over.is_set():
            return
        replica: Replica = await host.start(self._deployment, lambda _, event: self._take(event))
        click.echo(f"http://{replica.host}:{replica.port}/")
        note("  Ctrl-C stops it.")
        await self._over.wait()
        await replica.stop(_STOP_GRACE_S)

    async def _unless_over(self, work: Any) -> None:
        """Wait for `work` until a signal says otherwise."""
        task, over = asyncio.ensure_future(work), asyncio.ensure_future(self._over.wait())
        await asyncio.wait((task, over), return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if task.done():
            task.result()
            return
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    def _watch_signals(self) -> None:
        def asked(number: signal.Signals) -> None:
            self._signal = number
            self._over.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, asked, number)

    def _take(self, event: Event) -> None:
        fields = event.fields
        if event.name is EventName.STARTED:
            note(start_table(StartRecord.from_json(fields["record"])))
        elif event.name is EventName.FAILED:
            note(start_table(StartRecord.from_json(fields["record"])))
            self._error = HandlerError(
                "The function does not start.",
                why=str(fields.get("reason", "")),
                hint="What it printed stands above.",
                code=str(fields.get("code", "")) or None,
            )
            self._over.set()
        elif event.name is EventName.MODEL_EXITED:
            warn(f"The function's process ended: {fields.get('reason', '')}")
        elif event.name is EventName.SNAPSHOT and fields.get("state") != "building":
            note(f"  {snapshot_news(fields)}")
        elif event.name is EventName.STOPPED:
            self._over.set()


def start_table(record: StartRecord) -> str:
    """A start for people: its phases, and why faster ways were not taken."""
    rows = [
        {
            "phase": phase.name.value,
            "from": format_duration(phase.start_ns / 1e9),
            "took": format_duration(phase.seconds),
        }
        for phase in record.phases
    ]
    rows.append({"phase": "total", "from": "", "took": format_duration(record.total_ns / 1e9)})
    columns = [
        Column(record.rung.value.upper(), "phase"),
        Column("FROM", "from", right=True),
        Column("TOOK", "took", right=True),
    ]
    skipped = [f"  no {item.rung.value}: {item.reason}" for item in skipped_news(record)]
    return "\n".join([format_table(rows, columns), *skipped])
