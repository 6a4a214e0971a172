"""What commands print: answers on standard output in one of six forms, everything else on standard error.

Tables are kubectl's: upper-case headers, two spaces, no boxes, so that `awk` works on them. JSON, YAML and CSV
carry numbers in the units that their names end with, never what a table shows. Rich draws the progress line on a terminal where it is installed;
nothing else here needs it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

import click

FORMS = ("table", "wide", "json", "yaml", "csv", "name")
FORMS_OF_ONE = tuple(form for form in FORMS if form != "csv")
"""Of one thing in full, which is nested: no line of a CSV file."""
NOTHING = "–"
"""Shown in a table where a row has no value."""

Row = Mapping[str, Any]
_Command = TypeVar("_Command", bound=Callable[..., Any])


def show(value: Any) -> str:
    """A table cell: a dash for nothing, words for lists."""
    if value is None or value in ("", [], ()):
        return NOTHING
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def format_instant(at_ns: int) -> str:
    """An instant since the epoch as UTC, to the second."""
    return datetime.fromtimestamp(at_ns // 10**9, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its header, the row's key it shows, and how. `wide` ones appear with ``-o wide`` only."""

    header: str
    key: str
    show: Callable[[Any], str] = show
    right: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """How this run of a command prints its answer."""

    form: str = "table"
    headers: bool = True

    @property
    def for_people(self) -> bool:
        return self.form in ("table", "wide")

    def rows(self, rows: Sequence[Row], columns: Sequence[Column], *, name: str = "", empty: str = "") -> None:
        """Print a list. `name` is the key that ``-o name`` prints: the first column's, unless said. `empty` is a
        hint for people, on standard error, where there is nothing to show."""
        if self.form == "json":
            click.echo(json.dumps([dict(row) for row in rows], indent=2, default=str))
        elif self.form == "yaml":
            click.echo(_yaml([dict(row) for row in rows]), nl=False)
        elif self.form == "csv":
            click.echo(_csv(rows, columns, headers=self.headers), nl=False)
        elif self.form == "name":
            for row in rows:
                click.echo(str(row.get(name or columns[0].key, "")))
        elif rows:
            shown = [column for column in columns if self.form == "wide" or not column.wide]
            click.echo(format_table(rows, shown, headers=self.headers))
        elif empty:
            note(empty)

    def value(self, value: Row) -> None:
        """Print one thing: ``KEY  value`` lines, or the same form as one element of `rows`."""
        if self.form == "json":
            click.echo(json.dumps(dict(value), indent=2, default=str))
        elif self.form == "yaml":
            click.echo(_yaml(dict(value)), nl=False)
        elif self.form == "name":
            click.echo(str(next(iter(value.values()), "")))
        else:
            width = max((len(key) for key in value), default=0)
            for key, item in value.items():
                click.echo(f"{key.replace('_', ' ').upper():<{width}}  {show(item)}")


def output_options(command: _Command) -> _Command:
    """Adds ``-o/--output``, ``--json`` and ``--no-headers``; the command gets one argument `output`."""
    no_headers = click.option(
        "--no-headers", is_flag=True, expose_value=False, callback=_keep, help="Leave out the headers."
    )
    return _form_options(no_headers(command), FORMS)


def single_output_options(command: _Command) -> _Command:
    """The same for a command that shows one thing."""
    return _form_options(command, FORMS_OF_ONE)


def _form_options(command: _Command, forms: Sequence[str]) -> _Command:
    for option in (
        click.option("--json", "output_json", is_flag=True, expose_value=False, callback=_keep, help="Same as -o json."),
        click.option("-o", "--output", "output_form", type=click.Choice(forms), expose_value=False, callback=_keep,
                     help="Form of the answer [default: table]."),
    ):  # fmt: skip
        command = option(command)
    return command


def _keep(context: click.Context, param: click.Parameter, value: Any) -> Any:
    chosen: Output = context.params.get("output") or Output()
    if param.name == "output_form" and value:
        chosen = Output(value, chosen.headers)
    elif param.name == "output_json" and value:
        chosen = Output("json", chosen.headers)
    elif param.name == "no_headers" and value:
        chosen = Output(chosen.form, headers=False)
    context.params["output"] = chosen
    return value


def format_table(rows: Sequence[Row], columns: Sequence[Column], *, headers: bool = True) -> str:
    """The rows as aligned text, without a newline at the end."""
    cells = [[column.show(row.get(column.key)) for column in columns] for row in rows]
    if headers:
        cells.insert(0, [column.header for column in columns])
    widths = [max((len(line[index]) for line in cells), default=0) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    )


def _csv(rows: Sequence[Row], columns: Sequence[Column], *, headers: bool) -> str:
    """RFC 4180 with the wire names as headers; truth and nested values as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if headers:
        writer.writerow([column.key for column in columns])
    for row in rows:
        values = (row.get(column.key) for column in columns)
        writer.writerow([json.dumps(v) if isinstance(v, bool | list | tuple | dict) else v for v in values])
    return text.getvalue()


def _yaml(value: Any) -> str:
    import yaml

    plain = json.loads(json.dumps(value, default=str))  # YAML's safe form knows no Decimal or Enum
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def note(text: str) -> None:
    """A line for people, on standard error."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """A warning, on standard error."""
    click.secho(f"! {text}", fg="yellow", err=True)


class Progress:
    """What `progress` yields: `update` changes the words of the line."""

    def __init__(self, text: str, on_update: Callable[[str], None]) -> None:
        self.text = text
        self._on_update = on_update

    def update(self, text: str) -> None:
        self.text = text
        self._on_update(text)


@contextlib.contextmanager
def progress(text: str) -> Iterator[Progress]:
    """One line for one phase of long work: moving on a terminal, and left as ``✓ text  3.2s`` when it is over."""
    began = time.monotonic()
    with _spinner(text) as on_update:
        line = Progress(text, on_update)
        yield line  # an exception passes: its own words end the line
    note(f"{click.style('✓', fg='green')} {line.text}  {time.monotonic() - began:.1f}s")


@contextlib.contextmanager
def _spinner(text: str) -> Iterator[Callable[[str], None]]:
    console = _console()
    if console is None:
        yield lambda _: None
        return
    with console.status(text) as status:
        yield status.update


def _console() -> Any:
    """A rich console on standard error where it is a terminal and rich is installed, else None."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return Console(stderr=True)
