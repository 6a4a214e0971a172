"""Pictures of a results file: each bar against what was wanted, and starts as timelines. SVG, no library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from adapter.records import PhaseName
from adapter.units import format_duration

WIDTH, LABEL, ROW = 900, 250, 26
COLOURS = dict(zip(
    (phase.value for phase in PhaseName),
    ("#b5b5b5", "#8c8c8c", "#c9a227", "#4477aa", "#228833", "#ee6677", "#ccbb44", "#66ccee", "#aa3377"),
    strict=True,
))  # fmt: skip
"""One colour a phase, in their fixed order, told apart by colour-blind eyes (Paul Tol's bright set)."""


def write_plot(results: Path) -> Path:
    """Draw a results file beside it; returns the picture's path."""
    path = results.with_suffix(".svg")
    path.write_text(draw(json.loads(results.read_text(encoding="utf-8"))), encoding="utf-8")
    return path


def draw(data: Mapping[str, Any]) -> str:
    rows = [*_bars(data["bars"]), "", *_starts(data["starts"])]
    facts = data["machine"]
    title = f"gpufn, {data['date'][:10]}: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB"
    body = "".join(
        f'<g transform="translate(0 {40 + number * ROW})">{row}</g>' for number, row in enumerate([*rows, _legend()])
    )
    height = 40 + (len(rows) + 1) * ROW + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="22" font-size="15">{escape(title)}</text>{body}</svg>\n'
    )


def _text(x: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="16" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(x: float, width: float, colour: str, title: str) -> str:
    return f'<rect x="{x:.1f}" y="4" width="{max(width, 0.5):.1f}" height="16" fill="{colour}"><title>{escape(title)}</title></rect>'


def _bars(bars: list[dict[str, Any]]) -> Iterator[str]:
    """Each bar as long as its value is of what was wanted: beyond the line is better for ≥, before it for ≤."""
    line = LABEL + (WIDTH - LABEL) * 0.4
    for bar in bars:
        if bar["bar"] is None:
            continue
        wanted = float(bar["bar"].split()[1])
        share = bar["value"] / wanted if wanted else 1.0 + bar["value"]
        length = min(share * (line - LABEL), WIDTH - LABEL - 190) if wanted or bar["value"] else 0
        said = f"{bar['value']:g} {bar['unit']} (wanted {bar['bar']}{'' if bar['met'] else ', missed'})"
        mark = f'<path d="M{line:.1f} 0V24" stroke="#333" stroke-dasharray="3 3"/>'
        colour = "#4477aa" if bar["met"] else "#ee6677"
        end = LABEL + max(length, line - LABEL) + 8
        yield _text(LABEL - 8, bar["name"], "end") + _rect(LABEL, length, colour, said) + mark + _text(end, said)


def _starts(starts: Mapping[str, Any]) -> Iterator[str]:
    """One lane a start, all to the same scale; phases may overlap."""
    longest = max((record["total_ns"] for record in starts.values()), default=1)
    scale = (WIDTH - LABEL - 80) / longest
    for name, record in starts.items():
        lane = "".join(
            _rect(
                LABEL + phase["start_ns"] * scale,
                (phase["end_ns"] - phase["start_ns"]) * scale,
                COLOURS[phase["name"]],
                f"{phase['name']} {format_duration((phase['end_ns'] - phase['start_ns']) / 1e9)}",
            )
            for phase in record["phases"]
        )
        total = format_duration(record["total_ns"] / 1e9)
        yield _text(LABEL - 8, name, "end") + lane + _text(LABEL + record["total_ns"] * scale + 6, total)


def _legend() -> str:
    step = (WIDTH - 20) / len(COLOURS)
    return "".join(
        f'<rect x="{10 + i * step:.0f}" y="6" width="12" height="12" fill="{colour}"/>' + _text(26 + i * step, name)
        for i, (name, colour) in enumerate(COLOURS.items())
    )
