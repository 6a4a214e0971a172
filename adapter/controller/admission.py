"""Answers the API server's questions about pods and Knative Services that are being made.

A user's error is refused, with what to do, and so is a pod whose function has held its budget of the day; an error of
ours lets the object pass as it is. Nothing here asks anybody: all that it rests on is in memory.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapter.cluster.intent import Intent, read_intent
from adapter.cluster.inventory import Amounts, model_terms, ruled_out
from adapter.controller.cluster_view import ClusterView, mark_of
from adapter.controller.pod_patch import Facts, patch_pod
from adapter.errors import ConfigError, Overloaded
from adapter.knative.autoscaling import Defaults
from adapter.knative.service_patch import patch_service
from adapter.ledger.held import HeldToday
from adapter.policy.activity import Activity
from adapter.policy.budget import SPENT_CODE
from adapter.policy.placement import Node, Recent, Verdict, place

logger = logging.getLogger(__name__)

_API_VERSION, _KIND = "admission.k8s.io/v1", "AdmissionReview"
_STATUSES = {SPENT_CODE: (403, "Forbidden")}
"""Of what is refused though nothing is wrong with it: as the API server does where a quota is spent."""
_WARNING_LIMIT, _WARNINGS_LIMIT = 256, 12
"""Of what the API server passes on of a warning, and of all of them."""


@dataclass(frozen=True, slots=True)
class Review:
    """One question, read from its JSON."""

    uid: str
    namespace: str
    operation: str
    object: Mapping[str, Any]
    old: Mapping[str, Any] | None
    is_dry_run: bool

    @classmethod
    def parse(cls, body: bytes) -> Review:
        """Raises `ConfigError` for what is no review of an object."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise _no_review("It is not JSON.") from None
        if not isinstance(data, dict) or (data.get("apiVersion"), data.get("kind")) != (_API_VERSION, _KIND):
            raise _no_review(f"It is no {_KIND} of {_API_VERSION}.")
        request = data.get("request")
        if not isinstance(request, dict) or not isinstance(request.get("uid"), str) or not request["uid"]:
            raise _no_review("It has no request with a uid.")
        value, old = request.get("object"), request.get("oldObject")
        if not isinstance(value, dict):
            raise _no_review("It has no object.")
        return cls(
            request["uid"],
            str(request.get("namespace") or ""),
            str(request.get("operation") or ""),
            value,
            old if isinstance(old, dict) else None,
            request.get("dryRun") is True,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """`outcome`: ``patched``, ``untouched``, ``refused`` or ``failed``; `code` says more."""

    uid: str
    outcome: str
    code: str = ""
    operations: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        response: dict[str, Any] = {"uid": self.uid, "allowed": self.outcome != "refused"}
        if self.operations:
            response["patchType"] = "JSONPatch"
            response["patch"] = base64.b64encode(json.dumps(self.operations, separators=(",", ":")).encode()).decode()
        if self.warnings:
            response["warnings"] = [_clipped(text) for text in self.warnings[:_WARNINGS_LIMIT]]
        if self.message:
            status, reason = _STATUSES.get(self.code, (422, "Invalid"))
            response["status"] = {"code": status, "reason": reason, "message": self.message}
        return {"apiVersion": _API_VERSION, "kind": _KIND, "response": response}


class Admission:
    """Looks at objects as `view` sees the cluster at the moment."""

    def __init__(
        self,
        view: ClusterView,
        defaults: Callable[[], Defaults] = Defaults,
        held: HeldToday | None = None,
        activity: Callable[[str, str], Activity | None] = lambda _namespace, _function: None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`held`: what functions held today; None: budgets are not looked at. `activity`: what is known of a function,
        by its namespace and name."""
        self._view, self._defaults, self._held, self._clock_ns = view, defaults, held, clock_ns
        self._activity = activity
        self._recent = Recent()

    def pod(self, review: Review) -> Answer:
        """Of a pod that is being made."""
        return self._guarded(review, self._pod)

    def service(self, review: Review) -> Answer:
        """Of a Knative Service that is being made or changed."""
        return self._guarded(review, self._service)

    def _guarded(self, review: Review, look: Callable[[Review], Answer]) -> Answer:
        fields = {"namespace": review.namespace, "object": _name_of(review.object)}
        if why_not := self._view.why_not():
            logger.warning("an object passes unseen", extra={"fields": {**fields, "why": why_not}})
            return Answer(review.uid, "failed", "not-ready", warnings=("gpufn: not ready; this passes as it is.",))
        try:
            return look(review)
        except (ConfigError, Overloaded) as exc:
            logger.info("refused", extra={"fields": {**fields, "code": exc.code, "why": exc.message}})
            return Answer(review.uid, "refused", exc.code, message=exc.to_text())
        except Exception:  # boundary: no defect of ours keeps others from making pods
            logger.exception("an object passes unseen", extra={"fields": fields})
            return Answer(
                review.uid, "failed", "failed", warnings=("gpufn: an error of its own; this passes as it is.",)
            )

    # --------------------------------------------------------------------------------------------- pods

    def _pod(self, review: Review) -> Answer:
        if review.operation != "CREATE":
            return Answer(review.uid, "untouched")
        namespace = review.namespace
        labels = self._view.namespaces.get(namespace)
        intent = read_intent(review.object, namespace=namespace, namespace_labels=labels or {})
        if intent is None:
            return Answer(review.uid, "untouched")
        if (known := self._activity(namespace, intent.function)) is not None:
            intent = intent.measured(known.load_s)
        now_ns = self._clock_ns()
        code, warnings = self._budget(intent, now_ns, is_dry_run=review.is_dry_run)
        nodes = self._view.inventory()
        verdicts = place(intent.need, nodes, self._recent.mix)
        patch = patch_pod(review.object, intent, verdicts, self._facts(intent, verdicts, nodes, now_ns))
        is_known = labels is not None  # whoever reaches our port can make names up
        if patch.operations and not review.is_dry_run and is_known:
            self._recent.add(intent.need)
            self._promise(intent, verdicts, mark_of(namespace, str(now_ns)))
        return _answer(review, patch.operations, (*warnings, *patch.warnings), code)

    def _budget(self, intent: Intent, now_ns: int, *, is_dry_run: bool) -> tuple[str, tuple[str, ...]]:
        """An answer's code and its warnings. Raises `Overloaded` where the function's budget is spent: not in a dry run,
        as it is not the pod that is wrong. What is not known stops nobody."""
        if self._held is None or not intent.spec.budget_gpu_s or not intent.need.gpus:
            return "", ()
        budget = self._held.budget(intent.key, intent.spec.budget_gpu_s)
        refusal = budget.refusal(now_ns)
        if refusal is not None and not is_dry_run:
            raise refusal
        if text := budget.text(now_ns):
            return "", (text,)
        if not self._held.is_known:
            return "budget-unknown", ("gpufn: what this function held today is not known; its budget does not stop it",)
        return "", ()

    def _facts(self, intent: Intent, verdicts: Sequence[Verdict], nodes: Sequence[Node], now_ns: int) -> Facts:
        view, need = self._view, intent.need
        either = model_terms(need.models, view.model_labels) if need.models else ()
        wrong = ruled_out(verdicts, nodes) if need.models or need.memory_bytes or need.compute_capability else ()
        return Facts(
            now_ns=now_ns,
            hard=tuple((*term, *wrong) for term in either) or ((wrong,) if wrong else ()),
            runtime_classes=frozenset(view.runtime_classes.snapshot()),
            hostnames=view.hostnames,
            restores=view.restores,
        )

    def _promise(self, intent: Intent, verdicts: list[Verdict], mark: str) -> None:
        if not verdicts or not verdicts[0].fits:
            return
        best, need = verdicts[0], intent.need
        amounts: dict[str, int] = {"cpu": need.cpu_milli, "memory": need.host_memory_bytes}
        if best.resource:
            amounts[best.resource] = best.units
        self._view.promise(mark, best.node, _positive(amounts))

    # --------------------------------------------------------------------------------------------- services

    def _service(self, review: Review) -> Answer:
        if review.operation not in {"CREATE", "UPDATE"}:
            return Answer(review.uid, "untouched")
        patch = patch_service(
            review.object,
            review.old,
            namespace=review.namespace,
            namespace_labels=self._view.namespaces.get(review.namespace) or {},
            defaults=self._defaults(),
        )
        return _answer(review, patch.operations, patch.warnings)


def _answer(
    review: Review, operations: tuple[Mapping[str, Any], ...], warnings: tuple[str, ...], code: str = ""
) -> Answer:
    return Answer(review.uid, "patched" if operations else "untouched", code, operations, warnings)


def _positive(amounts: Mapping[str, int]) -> Amounts:
    return {name: amount for name, amount in amounts.items() if amount > 0}


def _name_of(value: Mapping[str, Any]) -> str:
    metadata = value.get("metadata")
    found = metadata if isinstance(metadata, Mapping) else {}
    return str(found.get("name") or found.get("generateName") or "")[:253]


def _clipped(text: str) -> str:
    return text if len(text) <= _WARNING_LIMIT else text[: _WARNING_LIMIT - 1] + "…"


def _no_review(why: str) -> ConfigError:
    return ConfigError("This is nothing to answer.", why=why, code="bad-review")
