"""What happens, in words for people: one line each.

A gateway tells what it does in its log: fixed phrases with fields. `narrate` says those that users wait for or
wonder about in words, and warnings whatever they are; ``gpufn -v`` shows the log itself instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from adapter.cli.output import note
from adapter.cli.scope import DEFAULT_NAMESPACE
from adapter.records import Rung, SkippedRung, StartRecord
from adapter.units import format_duration, format_size

Fields = Mapping[str, Any]


def snapshot_news(fields: Fields) -> str:
    """What became of a snapshot: ``snapshot of 41 MiB, taken in 1.2s``, or why there is none."""
    if fields["state"] == "published":
        return f"snapshot of {format_size(fields['bytes'])}, taken in {format_duration(fields['seconds'])}"
    if fields["state"] == "building":
        return "a snapshot is being taken"
    return f"no snapshot: {fields.get('reason', '')}  [{fields.get('code', fields['state'])}]"


def skipped_news(record: StartRecord) -> list[SkippedRung]:
    """The rungs that were skipped for a reason that somebody may want to hear: most handlers have no `build`."""
    return [skipped for skipped in record.skipped if (skipped.rung, skipped.code) != (Rung.START, "off")]


def narrate() -> None:
    """From now on, say on standard error what the gateway of this process does."""
    logging.root.handlers[:] = [_Narrator()]
    logging.root.setLevel(logging.INFO)


class _Narrator(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Words())

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or record.getMessage() in _PHRASES:
            try:
                note(self.format(record))
            except Exception:  # as every handler does: whoever logs must not fail of it
                self.handleError(record)


class _Words(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: Fields = getattr(record, "fields", {})
        say = _PHRASES.get(record.getMessage())
        if say is not None:
            return say(fields)
        words = [f"! {record.getMessage()}", *(f"{key}={value}" for key, value in fields.items())]
        line = click.style("  ".join(words), fg="yellow")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _name(fields: Fields) -> str:
    return str(fields["function"]).removesuffix(f".{DEFAULT_NAMESPACE}")


def _good(text: str) -> str:
    return f"{click.style('✓', fg='green')} {text}"


def _bad(text: str) -> str:
    return click.style(f"✗ {text}", fg="red")


_PHRASES: dict[str, Callable[[Fields], str]] = {
    "a function is deployed": lambda f: f"  {_name(f)} is deployed, revision {f['revision']}",
    "a function is removed": lambda f: f"  {_name(f)} is removed",
    "building an environment": lambda f: f"… preparing {Path(f['folder']).name}: installing its packages",
    "a function is ready": lambda f: _good(f"{_name(f)} is ready: {format_duration(f['seconds'])}"),
    "a function cannot be prepared": lambda f: _bad(f"{_name(f)} cannot be prepared: {f['why']}"),
    "a function cannot be taken up": lambda f: _bad(f"{_name(f)} cannot be taken up: {f['why']}"),
    "not all has effect": lambda f: click.style(f"! {_name(f)}: {f['why']}", fg="yellow"),
    "a replica is up": lambda f: _good(f"{_name(f)} is up: {format_duration(f['seconds'])} {f['rung']}"),
    "a start failed": lambda f: _bad(f"{_name(f)} did not start: {f['why']}"),
    "stopping a replica": lambda f: f"  {f['replica']} stops: {f['reason']}",
    "news of a snapshot": lambda f: f"  {_name(f)}: {snapshot_news(f)}",
}
"""Phrase of the log -> what is said of its fields."""
