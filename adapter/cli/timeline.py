"""Start records drawn: bars for a terminal, and a picture (SVG) for everywhere else.

Every phase has its own colour in every picture, whether or not its neighbours are there. The picture follows
the reader's light or dark setting, and says everything in words too: labels, totals, a legend, a tooltip a bar.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from xml.sax.saxutils import escape

from adapter.cli.news import skipped_news
from adapter.cli.output import format_instant
from adapter.records import Phase, PhaseName, StartRecord
from adapter.units import format_duration

BAR_CELLS = 48
"""Width of a terminal's bar; with its labels it fits 80 columns."""

COLOURS = {
    PhaseName.GPU_WAIT: ("#c0392b", "#e06c5f"),
    PhaseName.SCHEDULE: ("#7d8590", "#8b949e"),
    PhaseName.PULL: ("#9a6b1f", "#c69026"),
    PhaseName.BOOT: ("#5b6fd8", "#8194f0"),
    PhaseName.IMPORT: ("#a33ea1", "#d16fcf"),
    PhaseName.RESTORE: ("#0f8a5f", "#2fbf8a"),
    PhaseName.CUDA_RESTORE: ("#4d7c0f", "#84b83c"),
    PhaseName.LOAD: ("#d1481f", "#f0744a"),
    PhaseName.WEIGHTS: ("#8a5a44", "#b98a74"),
    PhaseName.GRAPHS: ("#6d4bb3", "#9d7fe0"),
    PhaseName.WARMUP: ("#d99a00", "#f0bd35"),
    PhaseName.HANDOVER: ("#178ba3", "#3fb8d0"),
    PhaseName.FIRST_RESPONSE: ("#3b9a1d", "#67c94a"),
}
"""Of each phase: for light and for dark grounds."""


def bars(records: Sequence[StartRecord]) -> str:
    """Each start as its phases, one a line, each start filling the whole width."""
    return "\n\n".join("\n".join(_bars_of(record)) for record in records)


def _bars_of(record: StartRecord) -> Iterator[str]:
    path = record.rung.value + (" failed" if record.error else "")
    total = format_duration(record.total_ns / 1e9)
    yield f"{format_instant(record.started_at_ns)}  {record.function}  {path}  {total}"
    if record.error:
        yield f"  {record.error}"
    for phase in sorted(record.phases, key=lambda p: (p.start_ns, p.end_ns)):
        yield f"  {phase.name.value:<14}  |{_bar(phase, record.total_ns)}|  {format_duration(phase.seconds):>7}"
    for skipped in skipped_news(record):
        yield f"  not {skipped.rung.value}: {skipped.reason or skipped.code}"


def _bar(phase: Phase, total_ns: int) -> str:
    """At least one cell, so that the shortest phase is seen."""
    scale = BAR_CELLS / max(total_ns, 1)
    first = min(BAR_CELLS - 1, max(0, int(phase.start_ns * scale)))
    last = min(BAR_CELLS, max(first + 1, round(phase.end_ns * scale)))
    return (" " * first + "█" * (last - first)).ljust(BAR_CELLS)


# The picture, in pixels.
_WIDTH, _LEFT, _RIGHT, _EDGE = 960, 232, 84, 16
_BAR, _STEP, _GAP = 20, 23, 12
_SCALE = _WIDTH - _LEFT - _RIGHT
_LETTER = 7.0
_MEASURE = "one start each, from asking for the replica until its first answer has ended"


def picture(records: Sequence[StartRecord]) -> str:
    """An SVG with one lane for each start, all to one scale; phases that overlap stand below each other."""
    longest_ns = max((record.total_ns for record in records), default=0) or 10**9
    legend, top = _legend(records)
    parts, y = [], top + 10
    for record in records:
        lane, height = _lane(record, y, longest_ns)
        parts += lane
        y += height + _GAP
    if not records:
        parts.append(f'<text class="quiet" x="{_LEFT}" y="{y + 14}">No starts.</text>')
        y += _STEP
    axis = list(_axis(longest_ns, top, y))
    height = y + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" aria-label="Cold starts, phase by phase">'
    )
    ground = f'<rect class="ground" width="{_WIDTH}" height="{height}"/>'
    title = (
        f'<text class="title" x="{_EDGE}" y="27">Cold starts, phase by phase'
        f'<tspan class="measure" dx="12">{_MEASURE}</tspan></text>'
    )
    return "\n".join([head, _style(), ground, title, *chain(legend, axis, parts), "</svg>\n"])


def _style() -> str:
    def colours(dark: int) -> str:
        return " ".join(f".{name.value} {{ fill: {pair[dark]}; }}" for name, pair in COLOURS.items())

    return (
        "<style>\n"
        "text { font: 12px ui-sans-serif, system-ui, 'DejaVu Sans', sans-serif; fill: #1f2328; }\n"
        ".title { font-size: 15px; font-weight: 600; } .measure { font-size: 12px; font-weight: 400; }\n"
        ".quiet, .measure { fill: #59636e; } .on { fill: #ffffff; font-size: 11px; }\n"
        ".ground { fill: #ffffff; } .line { stroke: #d1d9e0; } .failed { fill: #c21f30; }\n"
        f"{colours(0)}\n"
        "@media (prefers-color-scheme: dark) {\n"
        "text { fill: #e6edf3; } .quiet, .measure { fill: #9198a1; } .on { fill: #0d1117; }\n"
        ".ground { fill: #0d1117; } .line { stroke: #30363d; } .failed { fill: #ff7b72; }\n"
        f"{colours(1)}\n"
        "}\n</style>"
    )


def _legend(records: Sequence[StartRecord]) -> tuple[list[str], int]:
    """The phases there are, in order, and where the space below begins."""
    present = {phase.name for record in records for phase in record.phases}
    parts, x, y = [], float(_EDGE), 44
    for name in (name for name in PhaseName if name in present):
        words = name.value.replace("_", " ")
        width = 18 + _LETTER * len(words) + 16
        if x + width > _WIDTH - _EDGE:
            x, y = float(_EDGE), y + 20
        parts.append(f'<rect class="{name.value}" x="{x:.1f}" y="{y}" width="12" height="12" rx="2"/>')
        parts.append(f'<text x="{x + 18:.1f}" y="{y + 10}">{words}</text>')
        x += width
    return parts, y + 26


def _axis(longest_ns: int, top: int, bottom: int) -> Iterator[str]:
    step_ns = _tick_ns(longest_ns)
    for tick in range(longest_ns // step_ns + 1):
        x = _LEFT + tick * step_ns * _SCALE / longest_ns
        yield f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
        words = f"{tick * step_ns / 1e9:g} s"
        yield f'<text class="quiet" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{words}</text>'


def _tick_ns(longest_ns: int) -> int:
    """A round step, 1, 2 or 5 times a power of ten, that gives four to ten of them."""
    power: int = 10 ** max(0, len(str(longest_ns)) - 2)
    return next(power * factor for factor in (1, 2, 5, 10) if longest_ns <= power * factor * 10)


def _lane(record: StartRecord, y: int, longest_ns: int) -> tuple[list[str], int]:
    """One start: its labels, its bars, and how high all that is."""
    rows = _rows(record.phases)
    height = max(_STEP * max(rows.values(), default=0) + _STEP, _STEP + 16) - _STEP + _BAR
    label = record.function if len(record.function) <= 26 else record.function[:25] + "…"
    path = record.rung.value + (" failed" if record.error else "")
    when = format_instant(record.started_at_ns).replace("T", " ")
    parts = [
        f'<text x="{_EDGE}" y="{y + 14}">{escape(label)}</text>',
        f'<text class="{"failed" if record.error else "quiet"}" x="{_EDGE}" y="{y + 31}">{path}, {when}</text>',
    ]
    for phase, row in rows.items():
        parts += _box(phase, y + row * _STEP, longest_ns)
    end = _LEFT + record.total_ns * _SCALE / longest_ns
    parts.append(f'<text x="{end + 8:.1f}" y="{y + 14}">{format_duration(record.total_ns / 1e9)}</text>')
    return parts, height


def _rows(phases: Sequence[Phase]) -> dict[Phase, int]:
    """Phase -> row: the first in which it overlaps nothing."""
    rows: dict[Phase, int] = {}
    ends: list[int] = []
    for phase in sorted(phases, key=lambda p: (p.start_ns, p.end_ns)):
        row = next((index for index, end in enumerate(ends) if end <= phase.start_ns), len(ends))
        ends[row:row + 1] = [phase.end_ns]  # fmt: skip
        rows[phase] = row
    return rows


def _box(phase: Phase, y: int, longest_ns: int) -> list[str]:
    x = _LEFT + phase.start_ns * _SCALE / longest_ns
    width = max(1.0, (phase.end_ns - phase.start_ns) * _SCALE / longest_ns)
    words = phase.name.value.replace("_", " ")
    tip = f"{words}: {format_duration(phase.seconds)}, from {format_duration(phase.start_ns / 1e9)}"
    place = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"'
    parts = [f'<rect class="{phase.name.value}" {place} aria-label="{tip}"><title>{tip}</title></rect>']
    long = f"{words} {format_duration(phase.seconds)}"
    shown = next((text for text in (long, words) if len(text) * _LETTER + 8 < width), "")
    if shown:
        parts.append(f'<text class="on" x="{x + 5:.1f}" y="{y + 14}">{shown}</text>')
    return parts
