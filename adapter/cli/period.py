"""Ranges of time as users say them: in words, or from an instant to an instant. All UTC."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import click

from adapter.cli.output import format_instant
from adapter.units import parse_duration_s

_DAYS = re.compile(r"([0-9]{1,5})d")
_ACCEPTED = "today, yesterday, month, last-month, or a duration such as 24h or 7d"


@dataclass(frozen=True, slots=True)
class Period:
    """A range of instants; its start is in it, its end is not."""

    start_ns: int
    end_ns: int

    def __str__(self) -> str:
        return f"{format_instant(self.start_ns)} to {format_instant(self.end_ns)} (start included, end excluded)"


def period(words: str | None, start: str | None, end: str | None, now_ns: int) -> Period:
    """The range that was asked for; without a word, today up to now. Raises `click.UsageError`."""
    if words is not None and (start is not None or end is not None):
        raise click.UsageError("--for says it all: give it, or --start and --end.")
    if start is None and end is not None:
        raise click.UsageError("--end needs --start.")
    if start is not None:
        chosen = Period(_instant("--start", start), now_ns if end is None else _instant("--end", end))
    else:
        chosen = _in_words("today" if words is None else words, now_ns)
    if chosen.start_ns >= chosen.end_ns:
        raise click.UsageError(
            f"Nothing lies between {format_instant(chosen.start_ns)} and {format_instant(chosen.end_ns)}."
        )
    return chosen


def _in_words(words: str, now_ns: int) -> Period:
    today = datetime.fromtimestamp(now_ns // 10**9, timezone.utc).replace(hour=0, minute=0, second=0)
    month = today.replace(day=1)
    named = {
        "today": Period(_ns(today), now_ns),
        "yesterday": Period(_ns(today - timedelta(days=1)), _ns(today)),
        "month": Period(_ns(month), now_ns),
        "last-month": Period(_ns((month - timedelta(days=1)).replace(day=1)), _ns(month)),
    }
    if words in named:
        return named[words]
    days = _DAYS.fullmatch(words)
    try:
        seconds = int(days[1]) * 86400 if days else parse_duration_s(words)
    except ValueError as exc:
        raise click.BadParameter(f"{words!r} is not {_ACCEPTED}.", param_hint="'--for'") from exc
    return Period(max(0, now_ns - round(seconds * 1e9)), now_ns)


def _instant(option: str, text: str) -> int:
    try:
        at = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text.strip()))  # Python 3.10 knows no Z
    except ValueError as exc:
        raise click.BadParameter(
            f"{text!r} is no instant such as 2026-11-20 or 2026-11-20T08:00:00Z.", param_hint=f"'{option}'"
        ) from exc
    return max(0, _ns(at if at.tzinfo else at.replace(tzinfo=timezone.utc)))


def _ns(at: datetime) -> int:
    """Exact, where `timestamp()` would be a float."""
    return (at - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1) * 1000
