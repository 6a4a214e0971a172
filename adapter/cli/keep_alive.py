"""How long a cluster keeps a function warm, and why: what is set, beside what its traffic says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter.cli.cluster_ledger import ClusterLedger
from adapter.cluster.api import Api
from adapter.cluster.intent import Intent
from adapter.cluster.json_parts import object_in
from adapter.cluster.resources import CONFIG_MAPS
from adapter.errors import AdapterError
from adapter.knative.autoscaling import MIN_SCALE, Defaults, kept_s, scale_said
from adapter.knative.tuning import Revision, Traffic, read_revision, traffic_of, tune
from adapter.ledger.client import activity
from adapter.policy.activity import Activity
from adapter.policy.keep_alive import keep_alive
from adapter.units import format_duration

KNATIVE_NAMESPACE = "knative-serving"
_LOOK_BACK_NS = 2 * 86400 * 10**9


@dataclass(frozen=True, slots=True)
class Known:
    """What the ledger knows of a function; `why_not` in brackets, where it cannot be asked."""

    activity: Activity | None
    why_not: str = ""

    @property
    def load_s(self) -> float | None:
        return None if self.activity is None else self.activity.load_s


async def kept(api: Api, intent: Intent, known: Known, revision: Mapping[str, Any] | None) -> str:
    """``26s idle: a cold start takes …``. `revision`: the Knative Revision that serves, if one does."""
    traffic, unknown = traffic_of(known.activity, time.time_ns()), known.why_not
    if revision is not None and (ours := read_revision(revision)) is not None:
        return f"{_of_revision(ours, traffic, await knative_defaults(api))}{unknown}"
    found = keep_alive(intent.spec, traffic.habits)
    said = f"{format_duration(found.seconds)} idle" if found.seconds else "for ever"
    return f"{said}: {found.reason}{unknown}"


def _of_revision(revision: Revision, traffic: Traffic, defaults: Defaults) -> str:
    """What its annotations say, and what they are to become where that is something else."""
    found = tune(revision, traffic, defaults)
    now, next_ = (
        _annotated({**revision.theirs, **annotations}, defaults) for annotations in (revision.ours, found.annotations)
    )
    return f"{now}: {found.reason}" if now == next_ else f"{now}, soon {next_}: {found.reason}"


def _annotated(annotations: Mapping[str, str], defaults: Defaults) -> str:
    least = scale_said(annotations, MIN_SCALE)
    if (defaults.min_scale if least is None else least) > 0:
        return "for as long as min-scale is set"
    return f"{format_duration(kept_s(defaults, annotations))} idle"


async def knative_defaults(api: Api) -> Defaults:
    """What its ConfigMaps say; Knative's own where they cannot be read."""
    autoscaler, defaults = await asyncio.gather(
        *(_data(api, name) for name in ("config-autoscaler", "config-defaults"))
    )
    return Defaults.read(autoscaler, defaults)


async def _data(api: Api, name: str) -> Mapping[str, str]:
    try:
        return object_in(await api.get(CONFIG_MAPS.path(KNATIVE_NAMESPACE, name)), "data")
    except AdapterError:
        return {}


async def known_of(api: Api, intent: Intent) -> Known:
    now_ns = time.time_ns()
    try:
        question = activity(now_ns - _LOOK_BACK_NS)
        activities = question.read(await ClusterLedger(api).get(question.path, question.query))
    except AdapterError as error:
        return Known(None, f" (its traffic is not known: {error.message[:1].lower()}{error.message[1:].rstrip('.')})")
    own = (each for each in activities if (each.function, each.namespace) == (intent.function, intent.namespace))
    return Known(next(own, None))
