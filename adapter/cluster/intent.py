"""What a pod or a pod template asks of gpufn, read from its labels, annotations and limits."""

from __future__ import annotations

from dataclasses import dataclass

from adapter.policy.placement import Need
from adapter.spec import FunctionSpec


@dataclass(frozen=True, slots=True)
class Intent:
    """A function's pod as its user meant it. `framework`: ``knative``, ``openfaas`` or ``plain``.

    `container` is the index of the user's container in the pod's spec. `asked`: the `FunctionSpec` attributes that
    the user set, by annotation, label or limit; the others are defaults. `notes` are for people: which of two things
    that say the same wins, what has no effect here.
    """

    function: str
    namespace: str
    revision: str
    framework: str
    tenant: str
    container: int
    spec: FunctionSpec
    need: Need
    asked: frozenset[str] = frozenset()
    snapshots: bool = False
    """Its namespace lets it keep snapshots, and its spec does not switch them off."""
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.function}.{self.namespace}"
