"""Pictures of a results file, beside it: each bar against what was wanted, and starts as `gpufn starts` draws them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from adapter.cli.timeline import picture
from adapter.records import StartRecord

WIDTH, LABEL, ROW, TOP = 900, 250, 26, 40
LINE = LABEL + (WIDTH - LABEL) * 0.4
"""Where each bar would end if its value were exactly what was wanted."""


def write_plots(results: Path) -> None:
    """``<machine>_<date>.svg`` for the bars, and ``…_starts.svg`` where the file holds start records."""
    data = json.loads(results.read_text(encoding="utf-8"))
    results.with_suffix(".svg").write_text(draw(data), encoding="utf-8")
    starts = [_labelled(what, StartRecord.from_json(record)) for what, record in data["starts"].items()]
    if starts:
        results.with_name(f"{results.stem}_starts.svg").write_text(picture(starts), encoding="utf-8")


def _labelled(what: str, record: StartRecord) -> StartRecord:
    """``embed plain`` as ``embed, plain start``: what was measured, not the name under which it was deployed."""
    function, _, how = what.partition(" ")
    return replace(record, function=f"{function}, {how} start")


def draw(data: Mapping[str, Any]) -> str:
    """The bars as SVG: to the right of the line is better for ≥, to the left of it for ≤."""
    rows = list(_rows(data["bars"]))
    facts = data["machine"]
    title = f"gpufn, {data['date'][:10]}: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB"
    if "gpu" in facts:
        title += f"; {facts['gpu'].get('model', 'simulated GPU')}"
    body = "".join(f'<g transform="translate(0 {TOP + number * ROW})">{row}</g>' for number, row in enumerate(rows))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TOP + len(rows) * ROW + 10}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="10" y="22" font-size="15">{escape(title)}</text>{body}</svg>\n'
    )


def _rows(bars: list[dict[str, Any]]) -> Iterator[str]:
    for bar in bars:
        if bar["bar"] is None:
            continue
        wanted = float(bar["bar"].split()[1])
        share = bar["value"] / wanted if wanted else bar["value"]  # wanted 0: a bar for what should not be
        length = max(1.0, min(share * (LINE - LABEL), WIDTH - LABEL - 220))
        said = escape(f"{bar['value']:g} {bar['unit']} (wanted {bar['bar']}{'' if bar['met'] else ', missed'})")
        colour = "#4477aa" if bar["met"] else "#ee6677"
        yield (
            f'<text x="{LABEL - 8}" y="16" text-anchor="end">{escape(bar["name"])}</text>'
            f'<rect x="{LABEL}" y="4" width="{length:.1f}" height="16" fill="{colour}"><title>{said}</title></rect>'
            f'<path d="M{LINE:.1f} 0V24" stroke="#333" stroke-dasharray="3 3"/>'
            f'<text x="{LABEL + max(length, LINE - LABEL) + 8:.1f}" y="16">{said}</text>'
        )
