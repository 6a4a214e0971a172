"""Durations and sizes as users write them, and back. Nothing else knows unit strings.

Durations follow Go's syntax as OpenFaaS and Knative accept it (``1h30m``, ``250ms``);
a bare number means seconds, as in of-watchdog. Sizes follow Kubernetes quantities (``16Gi``, ``500M``).
"""

from __future__ import annotations

import re

_DURATION_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = r"([0-9]{1,18}(?:\.[0-9]{1,18})?)"  # bounded: any of them is a finite float
_SECONDS = re.compile(_NUMBER)
_DURATION_PART = re.compile(_NUMBER + r"(ns|us|µs|ms|s|m|h)")
_SIZE = re.compile(_NUMBER + r"(k|M|G|T|Ki|Mi|Gi|Ti)?B?")
_SIZE_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
               "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


def parse_duration_s(text: str) -> float:
    """Seconds of ``30``, ``30s``, ``1h15m`` or ``250ms``; `ValueError` says the accepted form."""
    text = text.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a duration like 30s, 5m, 1h30m or 250ms, or a number of seconds")
    return sum(float(number) * _DURATION_UNITS_S[unit] for number, unit in parts)


def parse_size_bytes(text: str) -> int:
    """Bytes of ``4096``, ``16Gi`` or ``500M``; `ValueError` says the accepted form."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("a size like 512Mi, 16Gi or 500M, or a number of bytes")
    number = float(match[1]) if "." in match[1] else int(match[1])  # whole numbers stay exact
    return int(number * _SIZE_UNITS[match[2] or ""])


def format_duration(seconds: float) -> str:
    """A duration for people: ``85ms``, ``1.24s``, ``3m20s``, ``2h05m``."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.995:
        return f"{seconds:.2f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


def format_size(size_bytes: int) -> str:
    """A size for people in binary units: ``812B``, ``4.0Ki``, ``3.1Gi``."""
    size = float(size_bytes)
    for unit in ("B", "Ki", "Mi", "Gi"):
        if size < 1023.95 or unit == "Gi":
            return f"{size:.0f}B" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    raise AssertionError("unreachable")
