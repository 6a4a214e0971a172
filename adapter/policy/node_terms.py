"""Conditions on nodes that a pod brings along: selectors, required affinity, tolerations.

Pure, and decided as Kubernetes decides them: a node that the scheduler will not take is not worth preferring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

KEEPING_OUT = frozenset({"NoSchedule", "NoExecute"})
"""Effects of taints that keep pods out; ``PreferNoSchedule`` only weighs."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on a node's labels. `operator`: ``In NotIn Exists DoesNotExist Gt Lt``; another never holds."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        if self.operator in ("DoesNotExist", "NotIn"):
            return value is None or (self.operator == "NotIn" and value not in self.values)
        if value is None:
            return False
        if self.operator == "In":
            return value in self.values
        return self.operator == "Exists" or self._compares(value)

    def _compares(self, value: str) -> bool:
        try:
            left, right = int(value), int(self.values[0])
        except (ValueError, IndexError):
            return False
        return left > right if self.operator == "Gt" else left < right if self.operator == "Lt" else False

    def __str__(self) -> str:
        words = {
            "In": "is",
            "NotIn": "is not",
            "Gt": ">",
            "Lt": "<",
            "Exists": "is there",
            "DoesNotExist": "is not there",
        }
        return " ".join(
            part for part in (self.key, words.get(self.operator, self.operator), "|".join(self.values)) if part
        )


@dataclass(frozen=True, slots=True)
class Taint:
    key: str
    value: str = ""
    effect: str = "NoSchedule"

    def __str__(self) -> str:
        return f"{self.key}={self.value}:{self.effect}" if self.value else f"{self.key}:{self.effect}"


@dataclass(frozen=True, slots=True)
class Toleration:
    """An empty `key` means all taints, an empty `effect` all effects; `value` None: whatever value it has."""

    key: str = ""
    value: str | None = None
    effect: str = ""

    def tolerates(self, taint: Taint) -> bool:
        return self.key in ("", taint.key) and self.effect in ("", taint.effect) and self.value in (None, taint.value)


@dataclass(frozen=True, slots=True)
class NodeTerms:
    """`all_of` must hold, and of the alternatives in `any_of`, where there are any, all conditions of one."""

    all_of: tuple[Requirement, ...] = ()
    any_of: tuple[tuple[Requirement, ...], ...] = ()
    tolerations: tuple[Toleration, ...] = ()

    def missing(self, labels: Mapping[str, str]) -> str:
        """The first condition that the labels do not meet, for people; empty: they meet all."""
        for requirement in self.all_of:
            if not requirement.holds(labels):
                return str(requirement)
        if self.any_of and not any(term and all(r.holds(labels) for r in term) for term in self.any_of):
            return " or ".join(" and ".join(map(str, term)) or "a term that matches nothing" for term in self.any_of)
        return ""


def untolerated(taints: Iterable[Taint], tolerations: Sequence[Toleration]) -> Taint | None:
    """The first taint that keeps a pod out."""
    for taint in taints:
        if taint.effect in KEEPING_OUT:
            for toleration in tolerations:  # no generator: this is asked for each node of a cluster
                if toleration.tolerates(taint):
                    break
            else:
                return taint
    return None


NO_TERMS = NodeTerms()
