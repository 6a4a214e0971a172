"""Kubernetes quantities, as API objects write them: ``500m``, ``2``, ``64Gi``, ``1e9``.

Wider than `adapter.units`, which reads what people write for us, and stricter than `kubernetes.utils.parse_quantity`, which
takes what no API server does: ``NaN``, ``1_000``, ``1e999999999``.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from functools import lru_cache

from adapter.errors import ConfigError

_QUANTITY = re.compile(
    r"([+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?[0-9]{1,2}))?"
)
_SUFFIXES = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(10) ** 3, "M": Decimal(10) ** 6,
    "G": Decimal(10) ** 9, "T": Decimal(10) ** 12, "P": Decimal(10) ** 15, "E": Decimal(10) ** 18,
    "Ki": Decimal(2) ** 10, "Mi": Decimal(2) ** 20, "Gi": Decimal(2) ** 30, "Ti": Decimal(2) ** 40,
    "Pi": Decimal(2) ** 50, "Ei": Decimal(2) ** 60,
}  # fmt: skip


def parse_quantity(value: object, *, thousandths: bool = False) -> int:
    """A quantity in whole units, rounded up as Kubernetes does; or in thousandths of one. Raises `ConfigError`."""
    return _parse(str(value), 1000 if thousandths else 1)


@lru_cache(maxsize=8192)
def _parse(text: str, scale: int) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"Quantity {text!r} cannot be used.", hint="Write 500m, 2 or 64Gi, as Kubernetes has it.", code="bad-value"
        )
    number = Decimal(match[1]) * (_SUFFIXES[match[2]] if match[2] else Decimal(10) ** int(match[3] or 0))
    return math.ceil(number * scale)
