"""The command `gpufn`: which sub-commands exist, in which panel, and how their errors end.

Sub-commands are imported when they run, so that ``gpufn --help`` stays fast: each module of `COMMANDS`
exposes `command`, a click command or group. Exit codes are those of `adapter.errors`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from adapter import __version__
from adapter.cli.errors import report
from adapter.errors import AdapterError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells do it: 128 + SIGINT."""


class Entry(NamedTuple):
    """One sub-command: the module that holds it, its panel, and its line in ``gpufn --help``."""

    module: str
    panel: str
    summary: str


COMMANDS = {
    "init": Entry("adapter.cli.init", "Make", "Write a new function folder."),
    "run": Entry("adapter.cli.run", "Make", "Run one function here, without a gateway."),
    "up": Entry("adapter.cli.up", "Make", "Serve functions on this machine behind the OpenFaaS API."),
    "invoke": Entry("adapter.cli.invoke", "Make", "Call a function."),
    "build": Entry("adapter.cli.build", "Make", "Build an image of a function folder."),
    "buildpack": Entry("adapter.cli.buildpack", "Make", "Write the buildpack, for pack and builder images."),
    "list": Entry("adapter.cli.list", "Look", "List functions and their replicas."),
    "describe": Entry("adapter.cli.describe", "Look", "Show one function in full."),
    "logs": Entry("adapter.cli.logs", "Look", "Print a function's logs."),
    "starts": Entry("adapter.cli.starts", "Look", "Show how replicas came up, phase by phase."),
    "top": Entry("adapter.cli.top", "Look", "Show replicas as they are now."),
    "nodes": Entry("adapter.cli.nodes", "Look", "List GPUs and who holds them, here or on a cluster."),
    "explain": Entry("adapter.cli.explain", "Look", "Say why a pod is where it is, or where a function would go."),
    "snapshot": Entry("adapter.cli.snapshot", "Snapshots", "Create, list, push, pull and prune snapshots."),
    "usage": Entry("adapter.cli.usage", "Usage", "Report GPU-seconds and what they cost."),
    "doctor": Entry(
        "adapter.cli.doctor", "Help", "Say what works on this machine or cluster, and how to mend the rest."
    ),
    "help": Entry("adapter.cli.help", "Help", "Show what a command is for and takes."),
}


class _ReaderLeft(Exception):
    """Who reads our output, such as `head`, has all it wanted."""


class Gpufn(click.Group):
    """A group that knows its sub-commands by name and imports the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get("list" if cmd_name == "ls" else cmd_name)
        return None if entry is None else _load(cmd_name, entry.module)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            raise _ReaderLeft from exc  # click would call it a failure

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and args[0] != "ls" and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=0.5)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for panel in dict.fromkeys(entry.panel for entry in COMMANDS.values()):
            with formatter.section(panel):
                formatter.write_dl([(n, e.summary) for n, e in COMMANDS.items() if e.panel == panel], col_max=12)


def _load(name: str, module: str) -> click.Command:
    """The command of `module`; where something is not installed, a command that says so when it runs."""
    try:
        command = importlib.import_module(module).command
    except ModuleNotFoundError as exc:
        missing = exc.name or module
        if missing.split(".")[0] == "adapter":
            why, hint = f"{missing} is missing.", "Install gpufn again, whole: pip install 'gpufn[all]'"
        else:
            why, hint = f"The package {missing} is not installed.", "Install it with: pip install 'gpufn[all]'"
        error = AdapterError(
            f"gpufn {name} is not part of this installation.", why=why, hint=hint, code="not-installed"
        )
        return _Missing(name, error)
    assert isinstance(command, click.Command)
    return command


class _Missing(click.Command):
    def __init__(self, name: str, error: AdapterError) -> None:
        super().__init__(name)
        self.error = error

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        raise self.error


@click.group(
    cls=Gpufn,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPUFN", "max_content_width": 100},
)
@click.version_option(__version__, prog_name="gpufn", message="%(prog)s %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to standard error.")
@click.option("--debug", is_flag=True, help="Log more, and show tracebacks.")
def gpufn(verbose: bool, debug: bool) -> None:
    """GPU functions for the FaaS framework you already run."""
    from adapter import logs

    logs.setup(level="DEBUG" if debug else "INFO" if verbose else "WARNING")


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Errors are printed, none is raised."""
    with click.Context(gpufn) as outer:  # errors are printed outside of the command's own context
        outer.color = False if _is_plain() else None
        return _run(arguments, outer.color)


def _is_plain() -> bool:
    """Whether colour is unwanted, terminal or not: see no-color.org."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def _run(arguments: Sequence[str], color: bool | None) -> int:
    try:
        result = gpufn.main(list(arguments) or ["--help"], prog_name="gpufn", standalone_mode=False, color=color)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except AdapterError as exc:
        if "--debug" in arguments:
            traceback.print_exc()
        return report(exc)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except (_ReaderLeft, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would fail again
        return 0
    except Exception as exc:  # boundary: whatever a command did not foresee
        return _unexpected(exc, arguments)


def _unexpected(exc: Exception, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
        return 1
    again = shlex.join(["gpufn", "--debug", *arguments])
    click.secho(f"✗ Unexpected {type(exc).__name__}: {exc}  [bug]", fg="red", err=True)
    click.echo(f"  This is a bug in gpufn. See where it happens with: {again}", err=True)
    return 1


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
