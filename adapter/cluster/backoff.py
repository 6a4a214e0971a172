"""How long to wait before the next attempt."""

from __future__ import annotations

import random


def pause_s(attempt: int, *, first_s: float, limit_s: float) -> float:
    """Before the attempt after number `attempt` (from 1): doubles up to `limit_s`, and of that a random part between
    half and all, so that those who failed together part."""
    whole_s = min(limit_s, first_s * 2.0 ** min(attempt - 1, 60))
    return random.uniform(whole_s / 2, whole_s)  # noqa: S311  # spreads clients, hides nothing


def a_little_less(seconds: float) -> float:
    """`seconds` less a random tenth: so that what happens again and again does not happen everywhere at once."""
    return random.uniform(0.9 * seconds, seconds)  # noqa: S311
