"""Price plans: what a second costs, by class, and in which phases it is billed. As a file:

    currency: EUR
    classes:
      standard:
        per_gpu_second: 0.000583
        per_replica_second: 0.00001
        billed: [restoring, running, idle, draining]

Reading the file is the caller's business; this module gets what was in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from adapter.errors import ConfigError
from adapter.records import LeasePhase

_DEFAULT_BILLED = frozenset({LeasePhase.RESTORING, LeasePhase.RUNNING, LeasePhase.IDLE, LeasePhase.DRAINING})
DEFAULT_CLASS = "standard"
"""Whoever writes a function names its class: one that the plan does not have must be no way to pay nothing."""
_PLAN_KEYS = ("currency", "classes")
_CLASS_KEYS = ("per_gpu_second", "per_replica_second", "billed")
_MAX_DIGITS = 30
"""Of a price: reports multiply prices exactly."""


@dataclass(frozen=True, slots=True)
class PriceClass:
    """Money for one GPU-second and one replica-second, and the phases that count."""

    per_gpu_second: Decimal = Decimal(0)
    per_replica_second: Decimal = Decimal(0)
    billed: frozenset[LeasePhase] = _DEFAULT_BILLED


@dataclass(frozen=True, slots=True)
class PricePlan:
    """Classes by name. One that is not named costs what `DEFAULT_CLASS` does, and without that one nothing."""

    currency: str = ""
    classes: Mapping[str, PriceClass] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: Any, source: str) -> PricePlan:
        """A plan from the mapping of a price file. Raises `ConfigError` naming the key."""
        _check_keys(data, _PLAN_KEYS, source)
        classes, currency = data.get("classes"), data.get("currency", "")
        if not isinstance(classes, Mapping):
            raise _bad(source, "classes", "a mapping of class names to prices")
        if not isinstance(currency, str):
            raise _bad(source, "currency", "its name, such as EUR")
        return cls(
            currency, {str(name): _price_class(value, f"{source}: classes.{name}") for name, value in classes.items()}
        )

    def rate(self, price_class: str, phase: LeasePhase, *, gpu: bool) -> Decimal:
        """Money for one second of a whole GPU, or of a replica without one, in `phase`."""
        price = self.classes.get(price_class, self.classes.get(DEFAULT_CLASS))
        if price is None or phase not in price.billed:
            return Decimal(0)
        return price.per_gpu_second if gpu else price.per_replica_second


def _price_class(data: Any, where: str) -> PriceClass:
    _check_keys(data, _CLASS_KEYS, where)
    billed = data.get("billed")
    try:
        phases = _DEFAULT_BILLED if billed is None else frozenset(LeasePhase(phase) for phase in billed)
    except (ValueError, TypeError) as exc:
        raise _bad(where, "billed", "a list of " + ", ".join(phase.value for phase in LeasePhase)) from exc
    return PriceClass(_money(data, "per_gpu_second", where), _money(data, "per_replica_second", where), phases)


def _money(data: Mapping[str, Any], key: str, where: str) -> Decimal:
    value = data.get(key, 0)
    try:
        money = Decimal(str(value))
    except InvalidOperation as exc:
        raise _bad(where, key, "a number") from exc
    if isinstance(value, bool) or not money.is_finite() or money < 0:
        raise _bad(where, key, "a number of zero or more")
    if len(format(money, "f")) > _MAX_DIGITS:
        raise _bad(where, key, f"a number of at most {_MAX_DIGITS} digits")
    return money


def _check_keys(data: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(data, Mapping):
        raise _bad(where, "", f"a mapping with {', '.join(known)}")
    for key in data:
        if key not in known:
            raise _bad(where, str(key), f"one of {', '.join(known)}")


def _bad(where: str, key: str, accepted: str) -> ConfigError:
    return ConfigError(
        f"{f'{where}: {key}' if key else where} cannot be used.", hint=f"Write {accepted}.", code="bad-prices"
    )
