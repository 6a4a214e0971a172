"""Knative's autoscaling annotations: their names and bounds, what a cluster's defaults are, and a keep-alive in them.

A Revision goes to zero when its *window* has passed without a request and then, at the least, its *retention period*
of the last pod. So a keep-alive is the sum of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from adapter.units import parse_duration_s

GROUP = "autoscaling.knative.dev/"
CLASS, WINDOW = f"{GROUP}class", f"{GROUP}window"
RETENTION = f"{GROUP}scale-to-zero-pod-retention-period"
MIN_SCALE, MAX_SCALE, INITIAL_SCALE = f"{GROUP}min-scale", f"{GROUP}max-scale", f"{GROUP}initial-scale"
KNATIVES_OWN = "kpa.autoscaling.knative.dev"
"""The class that scales to zero."""
_OTHER_NAMES = {
    RETENTION: f"{GROUP}scaleToZeroPodRetentionPeriod",
    MIN_SCALE: f"{GROUP}minScale",
    MAX_SCALE: f"{GROUP}maxScale",
    INITIAL_SCALE: f"{GROUP}initialScale",
}
"""Knative still reads these."""

SHORTEST_WINDOW_S, LONGEST_S = 6, 3600
"""Bounds of the window; the retention period has the upper one too."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a cluster's ConfigMaps of Knative say; as here where they say nothing."""

    window_s: int = 60
    retention_s: int = 0
    min_scale: int = 0
    allows_initial_zero: bool = False
    longest_timeout_s: int = 600

    @classmethod
    def read(cls, autoscaler: Mapping[str, str], defaults: Mapping[str, str]) -> Defaults:
        """From the data of `config-autoscaler` and `config-defaults`. Knative refuses values that cannot be used when
        they are written; one that is there all the same counts as not said."""
        found: dict[str, Any] = {}
        parsers: tuple[tuple[str, Mapping[str, str], str, Callable[[str], int]], ...] = (
            ("window_s", autoscaler, "stable-window", _seconds),
            ("retention_s", autoscaler, "scale-to-zero-pod-retention-period", _seconds),
            ("min_scale", autoscaler, "min-scale", int),
            ("allows_initial_zero", autoscaler, "allow-zero-initial-scale", _true),
            ("longest_timeout_s", defaults, "max-revision-timeout-seconds", int),
        )
        for name, data, key, parse in parsers:
            with suppress(KeyError, ValueError):
                found[name] = parse(data[key])
        return cls(**found)


def said(annotations: Mapping[str, str], key: str) -> str | None:
    """The value of one of Knative's annotations, under either of its names."""
    return annotations.get(key, annotations.get(_OTHER_NAMES.get(key, key)))


def scale_said(annotations: Mapping[str, str], key: str) -> int | None:
    """Of `MIN_SCALE` and its like; None where it is not said, or is no number, which Knative itself refuses."""
    text = said(annotations, key)
    return int(text) if text is not None and text.isdecimal() else None


def keep_alive(seconds: float, defaults: Defaults, annotations: Mapping[str, str]) -> dict[str, str]:
    """What keeps the last pod for so long after the last request, beside `annotations`, as far as Knative goes.

    A window of the user's stays. Ours is the cluster's own, since it is what growth is decided by as well, unless the
    keep-alive is shorter than that.
    """
    own = said(annotations, WINDOW)
    whole = max(SHORTEST_WINDOW_S, math.ceil(seconds))
    window_s = min(defaults.window_s, whole) if own is None else _window_s(own)
    retention_s = min(max(0, whole - window_s), LONGEST_S)
    terms = {WINDOW: f"{window_s}s"} if own is None and window_s < defaults.window_s else {}
    return terms | ({RETENTION: f"{retention_s}s"} if retention_s != defaults.retention_s else {})


def reach_s(defaults: Defaults, annotations: Mapping[str, str]) -> int:
    """The longest keep-alive that these annotations can say."""
    own = said(annotations, WINDOW)
    return LONGEST_S + (defaults.window_s if own is None else _window_s(own))


def kept_s(defaults: Defaults, annotations: Mapping[str, str]) -> int:
    """The keep-alive that annotations say."""
    window, retention = said(annotations, WINDOW), said(annotations, RETENTION)
    window_s = defaults.window_s if window is None else _window_s(window)
    try:
        return window_s + (defaults.retention_s if retention is None else _seconds(retention))
    except ValueError:
        return window_s


def _window_s(text: str) -> int:
    try:
        return min(max(SHORTEST_WINDOW_S, _seconds(text)), LONGEST_S)
    except ValueError:
        return SHORTEST_WINDOW_S


def _seconds(text: str) -> int:
    return math.ceil(parse_duration_s(text))


def _true(text: str) -> bool:
    return text.lower() == "true"
