"""What a function of a cluster held of its budget today: where it is spent no pod of it is made, whichever node fits."""

from __future__ import annotations

import time

from adapter.cli.cluster_ledger import ClusterLedger
from adapter.cluster.api import Api
from adapter.cluster.intent import Intent
from adapter.errors import AdapterError
from adapter.ledger.client import held
from adapter.policy.budget import Budget, utc_day


async def budgeted(api: Api, intent: Intent) -> str:
    """Empty where it has no budget, or no GPU to hold."""
    limit_gpu_s, now_ns = intent.spec.budget_gpu_s, time.time_ns()
    if not limit_gpu_s or not intent.spec.gpus:
        return ""
    question = held(*utc_day(now_ns))
    try:
        held_gpu_s = question.read(await ClusterLedger(api).get(question.path, question.query)).get(intent.key, 0.0)
    except AdapterError as error:
        return f"{limit_gpu_s:,.1f} GPU-seconds in a UTC day; {error.message[:1].lower()}{error.message[1:]}"
    budget = Budget(intent.key, held_gpu_s, limit_gpu_s, utc_day(now_ns)[1])
    return budget.text(now_ns) or f"{held_gpu_s:,.1f} of {limit_gpu_s:,.1f} GPU-seconds held in this UTC day"
