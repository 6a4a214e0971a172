"""Price plans: what a second costs, by class, and in which phases it is billed.

    currency: EUR
    classes:
      standard: {per_gpu_second: "0.000583", per_replica_second: "0.00001", billed: [restoring, running, idle]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from adapter.errors import ConfigError
from adapter.policy.leases import CPU_DEVICE
from adapter.records import LeaseInterval, LeasePhase

_DEFAULT_BILLED = frozenset({LeasePhase.RESTORING, LeasePhase.RUNNING, LeasePhase.IDLE, LeasePhase.DRAINING})
_KEYS = ("per_gpu_second", "per_replica_second", "billed")


@dataclass(frozen=True, slots=True)
class PriceClass:
    """Money for one GPU-second and one replica-second, and the phases that count."""

    per_gpu_second: Decimal = Decimal(0)
    per_replica_second: Decimal = Decimal(0)
    billed: frozenset[LeasePhase] = _DEFAULT_BILLED


@dataclass(frozen=True, slots=True)
class PricePlan:
    """Classes by name; one that is not named costs nothing."""

    currency: str = ""
    classes: Mapping[str, PriceClass] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: Any, source: str) -> PricePlan:
        """A plan from the mapping of a price file. Raises `ConfigError` naming the key."""
        if not isinstance(data, Mapping) or not isinstance(data.get("classes"), Mapping):
            raise _bad(source, "classes", "a mapping of class names to prices")
        classes = {str(name): _price_class(value, f"{source}: classes.{name}") for name, value in data["classes"].items()}
        return cls(str(data.get("currency", "")), classes)

    def cost(self, interval: LeaseInterval, nanoseconds: int) -> Decimal:
        """Money for `nanoseconds` of an interval."""
        price = self.classes.get(interval.price_class, PriceClass())
        if interval.phase not in price.billed:
            return Decimal(0)
        rate = price.per_replica_second if interval.device == CPU_DEVICE else price.per_gpu_second
        return rate * Decimal(nanoseconds) / 10**9 * Decimal(str(interval.share))


def _price_class(data: Any, where: str) -> PriceClass:
    if not isinstance(data, Mapping):
        raise _bad(where, "", "a mapping")
    for key in data:
        if key not in _KEYS:
            raise _bad(where, str(key), f"one of {', '.join(_KEYS)}")
    billed = data.get("billed")
    try:
        phases = _DEFAULT_BILLED if billed is None else frozenset(LeasePhase(phase) for phase in billed)
    except (ValueError, TypeError) as exc:
        raise _bad(where, "billed", "a list of " + ", ".join(phase.value for phase in LeasePhase)) from exc
    return PriceClass(_money(data, "per_gpu_second", where), _money(data, "per_replica_second", where), phases)


def _money(data: Mapping[str, Any], key: str, where: str) -> Decimal:
    try:
        value = Decimal(str(data.get(key, 0)))
    except InvalidOperation as exc:
        raise _bad(where, key, "a number") from exc
    if not value.is_finite() or value < 0:
        raise _bad(where, key, "a number of zero or more")
    return value


def _bad(where: str, key: str, accepted: str) -> ConfigError:
    return ConfigError(f"{where} {key} cannot be used.".replace("  ", " "), hint=f"Write {accepted}.", code="bad-prices")
