"""How long a function is kept warm while nobody calls it: from its own idle gaps and its own measured wakes.

Pure, and the same on every host. Everything is counted in seconds of a held GPU. Being kept idle costs *rent*: its
GPUs, or the memory of a function without any. Letting go costs the *wake* after it: the same is held while the function
comes up, and whoever called waits, each second of which is worth ``cold_price``. That is the ski-rental problem. Whoever rents until the
rent has reached the price of a wake pays at most twice what hindsight would have: the answer where little is known.
Of a function that was watched for a while, the time is taken that would have been cheapest over its own gaps, and
never further than `TRUST` times from that answer: what was learned may be wrong, and then costs a known factor only.

A replica that parks gives its GPU back and keeps its process: from then on its rent is that of host memory. Both
rungs are one rent that grows more slowly after `park_after_s`, so one decision says when to stop in either.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from statistics import median
from typing import Any

from adapter.records import PhaseName, Rung, StartRecord
from adapter.spec import FunctionSpec
from adapter.units import format_duration

LEAST_S = 6.0
"""The shortest keep-alive: the least window that Knative's autoscaler takes, and longer than a page's follow-ups."""

ASSUMED_WAKE_S = 30.0
"""A start with a model, before one was measured."""

MEMORY_RENT = 0.02
"""A second of host memory and what else of a machine a process without a GPU holds, in seconds of a held GPU."""

ASSUMED_RESUME_S = 0.5
"""Waking a process parked on a GPU, before one was measured; without a GPU it is a signal."""

ENOUGH_GAPS = 10
"""From so many on they are believed."""

TRUST = 4.0
"""How far what was learned may go from the answer that needs no learning, as a factor, up and down."""

HALF_LIFE_S = 2 * 86400.0
"""A gap of two days ago counts half."""

_NEAR_COST = 1.1
_NEAR_PRICE = 1.25
"""What is set stays set while the best one would cost at most a tenth less; and while nothing is learned yet, while
a wake's price has not changed by more than a quarter. Each change is a write on Kubernetes."""

_GAPS_KEPT, _WAKES_KEPT = 256, 15
_LATEST_WAKES = 3
_MARGIN = 1.05
"""How much longer than the gap which it is to span."""

_WINDOW_SLACK_S = 1.0
_QUANTILES = (0.02, 0.05, 0.1, 0.25)
"""Windows of arrival that a prewarm may span: without so much of the gaps at either end."""


class Basis(str, Enum):
    """What a keep-alive rests on."""

    SET = "set"
    """The user says it."""
    ASSUMED = "assumed"
    """No wake was measured yet."""
    PRIOR = "prior"
    """Measured wakes, and too few gaps."""
    LEARNED = "learned"


@dataclass(frozen=True, slots=True)
class Gap:
    """Nobody called for `seconds`; somebody did `age_s` ago."""

    seconds: float
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Wake:
    """From asking for a replica until it could take requests."""

    rung: Rung
    seconds: float

    @classmethod
    def of(cls, record: StartRecord) -> Wake:
        """Without its wait for a GPU, which says more of the neighbours, and without the handler's own time."""
        out = (PhaseName.GPU_WAIT, PhaseName.FIRST_RESPONSE)
        ready_ns = max((p.end_ns for p in record.phases if p.name not in out), default=record.total_ns)
        waited_ns = sum(p.end_ns - p.start_ns for p in record.phases if p.name is PhaseName.GPU_WAIT)
        return cls(record.rung, max(0, ready_ns - waited_ns) / 1e9)


@dataclass(frozen=True, slots=True)
class Habits:
    """What is known of one function. `wakes` are in the order of time; `parks`: its idle replicas do park."""

    gaps: tuple[Gap, ...] = ()
    wakes: tuple[Wake, ...] = ()
    parks: bool = False


@dataclass(frozen=True, slots=True)
class Prewarm:
    """Wake it `after_s` of idleness, and keep it for `for_s` from then on: a caller is expected in that time."""

    after_s: float
    for_s: float

    @property
    def until_s(self) -> float:
        return self.after_s + self.for_s


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """`seconds` of idleness until it is let go; 0: never. `reason` is for people."""

    seconds: float
    basis: Basis
    reason: str
    prewarm: Prewarm | None = None

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {"seconds": self.seconds, "basis": self.basis.value, "reason": self.reason}
        if self.prewarm is not None:
            said["prewarm"] = {"after_s": self.prewarm.after_s, "for_s": self.prewarm.for_s}
        return said


def keep_alive(
    spec: FunctionSpec, habits: Habits, *, current_s: float | None = None, may_prewarm: bool = False
) -> KeepAlive:
    """What to set. `current_s`: what is set now, which stays where it is nearly as good. `may_prewarm`: a GPU is free
    for that which is not the last one."""
    if spec.idle_s is not None:
        said = format_duration(spec.idle_s) if spec.idle_s else "never"
        return KeepAlive(spec.idle_s, Basis.SET, f"scale.idle says {said}")
    price = _Price.of(spec, habits)
    gaps = _Gaps.of(price, habits.gaps)
    if gaps.count < ENOUGH_GAPS:
        seconds = _prior_s(price, current_s)
        return KeepAlive(seconds, Basis.PRIOR if price.is_measured else Basis.ASSUMED, _why_prior(price, gaps.count))
    seconds, is_kept = _learned_s(price, gaps, current_s)
    prewarm = _prewarm(price, gaps, seconds) if may_prewarm else None
    return KeepAlive(seconds, Basis.LEARNED, _why_learned(price, gaps, seconds, is_kept=is_kept), prewarm)


def wake_s(habits: Habits) -> float | None:
    """What the next cold start is likely to take: the median of the rung that served most of the latest ones. None
    where none was measured."""
    cold = [wake for wake in habits.wakes if wake.rung is not Rung.RESUME]
    if not cold:
        return None
    latest = [wake.rung for wake in reversed(cold[-_LATEST_WAKES:])]
    rung, _ = Counter(latest).most_common(1)[0]  # of as many, the latest
    return median(wake.seconds for wake in cold if wake.rung is rung)


@dataclass(frozen=True, slots=True)
class _Price:
    """What keeping and letting go cost one function, in seconds of a held GPU."""

    wake_s: float
    is_measured: bool
    held: float
    cold_price: float
    idle_max_s: float
    park_after_s: float
    resume: float

    @classmethod
    def of(cls, spec: FunctionSpec, habits: Habits) -> _Price:
        measured_s = wake_s(habits)
        assumed_s = ASSUMED_RESUME_S if spec.gpus else 0.0
        resumed = [wake.seconds for wake in habits.wakes if wake.rung is Rung.RESUME] or [assumed_s]
        held = max(spec.gpus, MEMORY_RENT)
        return cls(
            wake_s=ASSUMED_WAKE_S if measured_s is None else measured_s,
            is_measured=measured_s is not None,
            held=held,
            cold_price=spec.cold_price,
            idle_max_s=spec.idle_max_s,
            park_after_s=spec.park_after_s if habits.parks and spec.park_after_s else math.inf,
            resume=median(resumed) * (held + spec.cold_price),
        )

    @property
    def wake(self) -> float:
        return self.wake_s * (self.held + self.cold_price)

    def rent(self, idle_s: float) -> float:
        """Of being kept for so long. Waking a parked replica counts as paid when it parks."""
        if idle_s <= self.park_after_s:
            return self.held * idle_s
        return self.held * self.park_after_s + self.resume + MEMORY_RENT * (idle_s - self.park_after_s)

    def kept_for(self, rent: float) -> float:
        """The longest time whose rent is not above `rent`."""
        if rent <= self.held * self.park_after_s:
            return rent / self.held
        parked = max(0.0, rent - self.held * self.park_after_s - self.resume)
        return self.park_after_s + parked / MEMORY_RENT

    def bounds_s(self, trust: float) -> tuple[float, float]:
        """The least and the longest that is safe to set."""
        low, high = (
            min(max(self.kept_for(self.wake * factor), LEAST_S), self.idle_max_s) for factor in (1 / trust, trust)
        )
        return low, high


@dataclass(frozen=True, slots=True)
class _Gaps:
    """Gaps in order, with sums up to each of them: of the weights, and of the rents by weight."""

    price: _Price
    seconds: tuple[float, ...]
    weights: tuple[float, ...]
    rents: tuple[float, ...]

    @classmethod
    def of(cls, price: _Price, gaps: Iterable[Gap]) -> _Gaps:
        """Those that any keep-alive spans say nothing of which one to take."""
        ordered = sorted((gap.seconds, 0.5 ** (gap.age_s / HALF_LIFE_S)) for gap in gaps if gap.seconds > LEAST_S)
        return cls(
            price,
            tuple(seconds for seconds, _ in ordered),
            tuple(accumulate((weight for _, weight in ordered), initial=0.0)),
            tuple(accumulate((price.rent(seconds) * weight for seconds, weight in ordered), initial=0.0)),
        )

    @property
    def count(self) -> int:
        return len(self.seconds)

    def share_within(self, idle_s: float) -> float:
        """The part of the gaps, 0 to 1, that is over by then."""
        return self.weights[bisect_right(self.seconds, idle_s)] / self.weights[-1]

    def cost(self, idle_s: float) -> float:
        """What one gap costs on average, where a function is kept for `idle_s`."""
        at = bisect_right(self.seconds, idle_s)
        longer = self.weights[-1] - self.weights[at]
        return (self.rents[at] + longer * (self.price.rent(idle_s) + self.price.wake)) / self.weights[-1]


def _prior_s(price: _Price, current_s: float | None) -> float:
    low, high = price.bounds_s(_NEAR_PRICE)
    if current_s is not None and low <= current_s <= high:
        return current_s
    (seconds, _) = price.bounds_s(1.0)
    return seconds


def _learned_s(price: _Price, gaps: _Gaps, current_s: float | None) -> tuple[float, bool]:
    """The cheapest time within the bounds, and whether it is what was set already."""
    low, high = price.bounds_s(TRUST)
    spanned = (min(seconds * _MARGIN, high) for seconds in gaps.seconds if low <= seconds * _MARGIN)
    best = min((low, *spanned), key=lambda seconds: (gaps.cost(seconds), -seconds))
    low, high = price.bounds_s(TRUST * _NEAR_PRICE)
    if current_s is not None and low <= current_s <= high and gaps.cost(current_s) <= gaps.cost(best) * _NEAR_COST:
        return current_s, True
    return best, False


def _prewarm(price: _Price, gaps: _Gaps, kept_s: float) -> Prewarm | None:
    """The window after `kept_s` in which a woken function is worth what it costs there; None where none is."""
    first = bisect_right(gaps.seconds, kept_s)
    if gaps.count - first < ENOUGH_GAPS:
        return None
    least, chosen = gaps.cost(kept_s) / _NEAR_COST, None
    for quantile in _QUANTILES:
        skipped = int((gaps.count - first) * quantile)
        begin_s, end_s = gaps.seconds[first + skipped], gaps.seconds[gaps.count - 1 - skipped]
        slack_s = _WINDOW_SLACK_S + (end_s - begin_s) * (_MARGIN - 1)
        begin_s, end_s = begin_s - slack_s, end_s + slack_s
        if begin_s - price.wake_s <= kept_s:
            continue
        cost = gaps.cost(kept_s) - _saved(price, gaps, begin_s, end_s)
        if cost < least:
            least, chosen = cost, Prewarm(begin_s - price.wake_s, price.wake_s + end_s - begin_s)
    return chosen


def _saved(price: _Price, gaps: _Gaps, begin_s: float, end_s: float) -> float:
    """What being warm from `begin_s` to `end_s` saves in one gap on average: the waiting of who comes then, without
    the GPU's time until they do; where nobody comes, all of it was in vain."""
    first, last = bisect_right(gaps.seconds, begin_s), bisect_right(gaps.seconds, end_s)
    came = gaps.weights[last] - gaps.weights[first]
    held = sum((gaps.weights[at + 1] - gaps.weights[at]) * (gaps.seconds[at] - begin_s) for at in range(first, last))
    in_vain = (gaps.weights[-1] - gaps.weights[last]) * (price.wake_s + end_s - begin_s)
    return (came * price.wake_s * price.cold_price - held - in_vain) / gaps.weights[-1]


def _why_price(price: _Price) -> str:
    took = "a cold start takes" if price.is_measured else "no cold start was measured yet, and one is taken to take"
    worth = f"which is worth {format_duration(price.wake)} of a held GPU (cold_price {price.cold_price:g})"
    return f"{took} {format_duration(price.wake_s)}, {worth}"


def _why_prior(price: _Price, count: int) -> str:
    return f"{_why_price(price)}; {count} of {ENOUGH_GAPS} idle gaps known, so it is kept for what that costs"


def _why_learned(price: _Price, gaps: _Gaps, seconds: float, *, is_kept: bool) -> str:
    share = f"{gaps.share_within(seconds):.0%} of the latest {gaps.count} idle gaps are shorter"
    kept = "; the best time would save less than a tenth, so what was set stays" if is_kept else ""
    return f"{_why_price(price)}; {share}{kept}"


@dataclass(slots=True)
class History:
    """One function's habits as they come: told of when it becomes idle and busy, and how it woke. Bounded.

    Instants are seconds of any one clock that does not go back.
    """

    parks: bool = False
    _gaps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_GAPS_KEPT))
    _wakes: deque[Wake] = field(default_factory=lambda: deque(maxlen=_WAKES_KEPT))
    idle_since_s: float | None = None
    """When its last request ended; None while it has some, and before the first."""

    def idle(self, now_s: float) -> None:
        """Its last request has ended."""
        self.idle_since_s = now_s

    def busy(self, now_s: float) -> bool:
        """A request came; returns whether that taught something."""
        since_s, self.idle_since_s = self.idle_since_s, None
        if since_s is None or now_s - since_s <= LEAST_S:
            return False
        self._gaps.append((now_s, now_s - since_s))
        return True

    def woke(self, wake: Wake) -> None:
        self._wakes.append(wake)

    def habits(self, now_s: float) -> Habits:
        gaps = tuple(Gap(seconds, now_s - ended_at_s) for ended_at_s, seconds in self._gaps)
        return Habits(gaps, tuple(self._wakes), self.parks)
