"""Which GPUs a replica gets, and who makes room for it.

Pure: devices, the claims on them and one want in, a decision out. Free memory is what claims say, never what a
driver says: a parked process is invisible there, and its memory would be given away twice.

A claim holds bytes of devices. A share of a GPU is that share of its memory, a memory need counts as it is, and
either lets several replicas have one device; counts above one take whole devices of one model. MIG slices are
devices of their own. A parked claim holds nothing, but remembers where it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from typing import TypeAlias

from adapter.policy.gpu_models import matches
from adapter.spec import FunctionSpec
from adapter.units import format_size

_EXACT_CLAIMS = 8
"""Idle claims on a device of which every set is compared (256); of more, the cheapest by byte are taken."""

_EXACT_SETS = 512
"""Sets of whole devices that are compared; of more, the cheapest devices are taken one by one."""

_SHOWN_DEVICES = 4
"""In a reason, for people."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or one MIG slice of it. `model` is the driver's name for it."""

    uuid: str
    model: str
    memory_bytes: int
    is_slice: bool = False


class ClaimState(str, Enum):
    STARTING = "starting"
    """Its memory is taken, no request can be answered yet: also while it wakes."""
    RUNNING = "running"
    IDLE = "idle"
    """The only ones that are asked to make room."""
    LEAVING = "leaving"
    """Its memory comes back without anybody's doing."""
    PARKED = "parked"
    """It holds no memory."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One replica's claim: `bytes_each` of every one of `devices` (UUIDs), which parked ones only remember.

    `wake_s` is the price of its eviction: how much longer its next request will wait. `min_replicas` is its
    function's: so many of them are left alone.
    """

    replica: str
    function: str
    devices: tuple[str, ...]
    bytes_each: int
    state: ClaimState
    idle_since_s: float | None = None
    wake_s: float = 0.0
    min_replicas: int = 0

    def bytes_on(self, device: str) -> int:
        """What it holds of a device now."""
        return self.bytes_each if self.state is not ClaimState.PARKED and device in self.devices else 0


@dataclass(frozen=True, slots=True)
class Want:
    """What one replica of `function` (``name.namespace``) needs.

    `was_on`: where a parked replica was. It goes back there, or to others of the same model.
    `replaces`: it takes the place of a replica of the same function, which may be evicted for it.
    """

    function: str
    gpus: float
    memory_bytes: int = 0
    models: tuple[str, ...] = ()
    was_on: tuple[str, ...] = ()
    replaces: bool = False

    @classmethod
    def of(cls, function: str, spec: FunctionSpec) -> Want:
        return cls(function, spec.gpus, spec.gpu_memory_bytes, spec.gpu_models)

    @property
    def count(self) -> int:
        """How many devices it is on."""
        return max(1, int(self.gpus))

    def bytes_of(self, device: Device) -> int:
        """What it takes of a device that it gets."""
        if self.gpus > 1:
            return device.memory_bytes
        return self.memory_bytes or max(1, int(self.gpus * device.memory_bytes))

    def share_of(self, device: Device) -> float:
        """The same as a share of the device, or a count of whole ones. Shares of one device never exceed 1."""
        if self.gpus > 1 or not self.memory_bytes:
            return self.gpus
        return math.floor(1e6 * self.memory_bytes / device.memory_bytes) / 1e6


@dataclass(frozen=True, slots=True)
class Granted:
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Evict:
    """`devices` can be granted once `victims` have given back what they hold of them."""

    devices: tuple[Device, ...]
    victims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Nobody can be asked to make room. `devices` will have it soonest: kept for this want, it does not starve."""

    devices: tuple[Device, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """These devices, however empty, are not enough. `code` is stable."""

    reason: str
    code: str


Decision: TypeAlias = Granted | Evict | Wait | Refused


def decide(devices: Iterable[Device], claims: Iterable[Claim], want: Want, kept: Collection[str] = ()) -> Decision:
    """What to do about `want` now. Deterministic: no order of the arguments matters.

    `kept` are devices (UUIDs) that it may not have, because somebody waits for them.
    """
    devices, claims = sorted(devices, key=lambda d: d.uuid), sorted(claims, key=lambda c: c.replica)
    fitting = _fitting(devices, want)
    if isinstance(fitting, Refused):
        return fitting
    place = _Place(want, claims, [[d for d in group if d.uuid not in kept] for group in fitting])
    return place.grant() or place.evict() or place.wait(describe(_flat(fitting), claims))


def is_spare(devices: Iterable[Device], claims: Iterable[Claim], want: Want) -> bool:
    """Whether `want` could be granted now, and the same once more after it: no guess takes the last one from a request."""
    devices, claims = list(devices), list(claims)
    first = decide(devices, claims, want)
    if not isinstance(first, Granted):
        return False
    each = want.bytes_of(first.devices[0])
    taken = Claim(want.function, want.function, tuple(d.uuid for d in first.devices), each, ClaimState.STARTING)
    return isinstance(decide(devices, [*claims, taken], want), Granted)


def free_bytes(device: Device, claims: Iterable[Claim]) -> int:
    """What no claim holds."""
    return device.memory_bytes - sum(claim.bytes_on(device.uuid) for claim in claims)


def describe(devices: Sequence[Device], claims: Iterable[Claim]) -> str:
    """Who holds what, for people: ``GPU-1 (H100): 10.0Gi of 80.0Gi free, embed-3 running 40.0Gi, …``."""
    claims = list(claims)
    texts = []
    for device in devices[:_SHOWN_DEVICES]:
        held = [c for c in claims if c.bytes_on(device.uuid)]
        who = [f"{c.replica} {c.state.value} {format_size(c.bytes_each)}" for c in held]
        free = f"{format_size(free_bytes(device, held))} of {format_size(device.memory_bytes)} free"
        texts.append(f"{device.uuid} ({device.model}): " + ", ".join([free, *who]))
    more = len(devices) - _SHOWN_DEVICES
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


def _flat(groups: Iterable[Sequence[Device]]) -> list[Device]:
    return [device for group in groups for device in group]


# What can be used at all ---------------------------------------------------------------------------


def _fitting(devices: Sequence[Device], want: Want) -> list[list[Device]] | Refused:
    """Groups of devices that `want` could have if they were empty: of equal preference, or for counts of one model."""
    if not devices:
        return Refused("There is no GPU here.", "no-gpu")
    if want.was_on:
        groups = _same_as(want.was_on, devices)
        if not groups:
            return Refused(f"{', '.join(want.was_on)} is not here any more.", "gpu-gone")
    else:
        groups = _by_preference(devices, want.models)
        if not groups:
            there = ", ".join(sorted({d.model for d in devices}))
            return Refused(f"None is a {' or '.join(want.models)}; here: {there}.", "gpu-model-missing")
    largest = max(d.memory_bytes for d in _flat(groups))
    groups = [[d for d in group if max(want.bytes_of(d), want.memory_bytes) <= d.memory_bytes] for group in groups]
    if not any(groups):
        return Refused(
            f"{format_size(want.memory_bytes)} are wanted of one, the largest has {format_size(largest)}.",
            "gpu-too-small",
        )
    if want.count > 1:
        groups = [alike for group in groups for alike in _by_model(group)]
        most = max((len(group) for group in groups), default=0)
        if most < want.count:
            return Refused(f"{want.count} of one model are wanted, there are {most} at most.", "gpu-too-few")
    return groups


def _same_as(uuids: Collection[str], devices: Sequence[Device]) -> list[list[Device]]:
    """A process that was checkpointed on some devices can only be restored on the same kind."""
    homes = [d for d in devices if d.uuid in uuids]
    if len(homes) < len(uuids):
        return []
    kind = (homes[0].model, homes[0].memory_bytes)
    return [[d for d in devices if (d.model, d.memory_bytes) == kind]]


def _by_preference(devices: Sequence[Device], models: Sequence[str]) -> list[list[Device]]:
    if not models:
        return [list(devices)]
    groups: list[list[Device]] = []
    left = list(devices)
    for model in models:
        groups.append([d for d in left if matches(model, d.model, d.memory_bytes)])
        left = [d for d in left if d not in groups[-1]]
    return [group for group in groups if group]


def _by_model(devices: Sequence[Device]) -> Iterator[list[Device]]:
    """Whole GPUs that are alike. No process can have more than one slice."""
    kinds: dict[tuple[str, int], list[Device]] = {}
    for device in devices:
        if not device.is_slice:
            kinds.setdefault((device.model, device.memory_bytes), []).append(device)
    yield from kinds.values()


# What can be had ------------------------------------------------------------------------------------

Victims: TypeAlias = tuple[Claim, ...]


class _Place:
    """The search for one want. `groups` are the devices that it may have, the preferred ones first."""

    def __init__(self, want: Want, claims: Sequence[Claim], groups: Sequence[Sequence[Device]]) -> None:
        self._want = want
        self._claims = claims
        self._groups = groups
        self._missing = {
            d.uuid: want.bytes_of(d) - free_bytes(d, claims) for group in groups for d in group
        }  # zero or less: it fits
        self._candidates = {c.replica for c in claims if self._may_be_asked(c)}
        awake = Counter(c.function for c in claims if c.state not in (ClaimState.PARKED, ClaimState.LEAVING))
        self._spare = {c.function: self._spare_of(c, awake[c.function]) for c in claims}

    def _may_be_asked(self, claim: Claim) -> bool:
        if claim.state is ClaimState.LEAVING:
            return True
        return claim.state is ClaimState.IDLE and (claim.function != self._want.function or self._want.replaces)

    def _spare_of(self, claim: Claim, awake: int) -> int:
        """How many replicas of the claim's function may go."""
        return awake if claim.function == self._want.function else max(0, awake - claim.min_replicas)

    def grant(self) -> Granted | None:
        """The devices with room that leave the least of it over, of the most preferred group that has enough."""
        count = self._want.count
        for group in self._groups:
            roomy = sorted((d for d in group if self._missing[d.uuid] <= 0), key=self._tightest_first)
            if len(roomy) >= count:
                return Granted(tuple(roomy[:count]))
        return None

    def _tightest_first(self, device: Device) -> tuple[bool, int, str]:
        return (device.uuid not in self._want.was_on, -self._missing[device.uuid], device.uuid)

    def evict(self) -> Evict | None:
        """The cheapest of what can be had by evicting."""
        find = self._on_one if self._want.count == 1 else self._on_several
        plans = [(rank, plan) for rank, group in enumerate(self._groups) for plan in find(group)]
        return min(plans, key=lambda ranked: self._price(*ranked))[1] if plans else None

    def _price(self, rank: int, plan: Evict) -> tuple[object, ...]:
        """First of all seconds; what follows makes it one choice, whoever asks."""
        away = any(d.uuid not in self._want.was_on for d in plan.devices)
        names = [d.uuid for d in plan.devices], [v.replica for v in plan.victims]
        return (_seconds(plan.victims), len(plan.victims), rank, away, _latest_idle(plan.victims), *names)

    def _on_one(self, group: Sequence[Device]) -> Iterator[Evict]:
        for device in group:
            asked = [c for c in self._claims if c.bytes_on(device.uuid) and c.replica in self._candidates]
            few = len(asked) <= _EXACT_CLAIMS
            for victims in _every_set(asked) if few else self._cheap_sets(device, asked):
                if self._frees(device, victims) and self._may_go(victims):
                    yield Evict((device,), victims)

    def _cheap_sets(self, device: Device, asked: Sequence[Claim]) -> Iterator[Victims]:
        """Each alone, and the cheapest by byte together, without those that can be left out after all."""
        yield from ((claim,) for claim in asked)
        chosen: list[Claim] = []
        for claim in sorted(asked, key=lambda c: (c.wake_s / c.bytes_each, c.replica)):
            if self._frees(device, chosen):
                break
            if self._may_go((*chosen, claim)):
                chosen.append(claim)
        for claim in sorted(chosen, key=lambda c: (-c.wake_s, c.replica)):
            rest = [c for c in chosen if c is not claim]
            chosen = rest if self._frees(device, rest) else chosen
        yield tuple(sorted(chosen, key=lambda c: c.replica))

    def _on_several(self, group: Sequence[Device]) -> Iterator[Evict]:
        """Whole devices: everybody on them must go."""
        blockers = {d.uuid: [c for c in self._claims if c.bytes_on(d.uuid)] for d in group}
        able = [d for d in group if all(c.replica in self._candidates for c in blockers[d.uuid])]
        count = self._want.count
        few = math.comb(len(able), count) <= _EXACT_SETS
        for devices in combinations(able, count) if few else self._cheap_devices(able, blockers):
            victims = _union(devices, blockers)
            if len(devices) == count and self._may_go(victims):
                yield Evict(tuple(devices), victims)

    def _cheap_devices(self, able: Sequence[Device], blockers: Mapping[str, list[Claim]]) -> Iterator[Sequence[Device]]:
        chosen: list[Device] = []
        while len(chosen) < self._want.count:
            options = [[*chosen, d] for d in able if d not in chosen and self._may_go(_union([*chosen, d], blockers))]
            if not options:
                break
            chosen = min(options, key=lambda o: (_seconds(_union(o, blockers)), o[-1].uuid))
        yield chosen

    def _frees(self, device: Device, victims: Iterable[Claim]) -> bool:
        return sum(v.bytes_on(device.uuid) for v in victims) >= self._missing[device.uuid]

    def _may_go(self, victims: Iterable[Claim]) -> bool:
        """Whether every function keeps its minimum."""
        asked = Counter(v.function for v in victims if v.state is ClaimState.IDLE)
        return all(count <= self._spare[function] for function, count in asked.items())

    def wait(self, holders: str) -> Wait:
        """Keeps the devices on which the least is held by those who cannot be asked."""
        stuck = [c for c in self._claims if c.replica not in self._candidates]
        held = {uuid: sum(c.bytes_on(uuid) for c in stuck) for uuid in self._missing}
        options = []
        for rank, group in enumerate(self._groups):
            soonest = tuple(sorted(group, key=lambda d: (held[d.uuid], d.uuid)))[: self._want.count]
            if len(soonest) == self._want.count:
                options.append((sum(held[d.uuid] for d in soonest), rank, soonest))
        devices = min(options, key=lambda option: option[:2])[2] if options else ()
        return Wait(devices, holders if devices else f"Others wait for it already. {holders}")


def _every_set(claims: Sequence[Claim]) -> Iterator[Victims]:
    for size in range(len(claims) + 1):
        yield from combinations(claims, size)


def _union(devices: Iterable[Device], blockers: Mapping[str, list[Claim]]) -> Victims:
    named = {c.replica: c for d in devices for c in blockers[d.uuid]}
    return tuple(named[name] for name in sorted(named))


def _seconds(victims: Iterable[Claim]) -> float:
    return math.fsum(v.wake_s for v in victims)


def _latest_idle(victims: Iterable[Claim]) -> float:
    """When the latest of them was last of use: of sets with one price, the one that rests longest goes."""
    return max((v.idle_since_s for v in victims if v.idle_since_s is not None), default=0.0)
