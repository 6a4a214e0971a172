"""kn's recorded conversations, said again to a real API server with Knative and gpufn on it: it must still answer as it did.

See `tests/contract/knative/record.py`.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import requests

from tests.contract.knative import conversation
from tests.contract.knative.scenario import STEPS
from tests.testbed.cluster import Cluster

CONVERSATIONS = sorted((Path(conversation.__file__).parent / "conversations").glob("*.json"))
WAIT_S = 240


class Speaker:
    """Says what kn said, and keeps in mind what kn does: the version of each object that it has read."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._versions: dict[str, str] = {}

    def say(self, request: dict[str, Any]) -> dict[str, Any]:
        """What is kept of the answer."""
        path, body = request["path"], request.get("body")
        if request["method"] == "PUT":
            body["metadata"]["resourceVersion"] = self._versions[path]
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        watch = conversation.is_watch(path)
        headers = {"Content-Type": request["type"]} if body else {}
        with (
            self._cluster.session() as session,
            session.request(
                request["method"],
                self._cluster.site.server + path,
                data=json.dumps(body).replace(conversation.TIME, now) if body else None,
                headers=headers,
                stream=watch,
                timeout=WAIT_S,
            ) as answer,
        ):
            if watch and answer.ok:
                _until_ready(answer)
            content = b"" if watch else answer.content
            if content:
                self._versions[path] = answer.json()["metadata"].get("resourceVersion", "")
            return conversation.answer(answer.status_code, answer.headers, content)


def _until_ready(events: requests.Response) -> None:
    """As long as kn listens."""
    for line in events.iter_lines():
        seen = json.loads(line)["object"]
        status = seen.get("status", {})
        conditions = {item["type"]: item["status"] for item in status.get("conditions", ())}
        if status.get("observedGeneration") == seen["metadata"]["generation"] and conditions.get("Ready") == "True":
            return
    raise AssertionError("the watch has ended, and the Service is not ready")


def test_kn_still_hears_what_it_heard(gpufn, namespace, echo_image):
    speaker = Speaker(gpufn.cluster)
    for path in CONVERSATIONS:
        text = path.read_text().replace(conversation.NAMESPACE, namespace)
        for exchange in json.loads(text)["exchanges"]:
            assert speaker.say(exchange["request"]) == exchange["answer"], path.stem


def test_every_step_of_the_scenario_is_recorded():
    recorded = [(path.stem.partition("-")[2], json.loads(path.read_text())["command"][1:]) for path in CONVERSATIONS]
    assert recorded == [(step.name, list(step.arguments)) for step in STEPS]
