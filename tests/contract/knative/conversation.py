"""What is kept of a conversation between kn and an API server: the same when it is recorded and when it is said again.

Gone is what differs from run to run: times, ids, versions of objects, their state, and what Knative's controllers write
down for each other. Kept of an answer is what kn and its user go by, and what our webhook has put in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

NAMESPACE = "team-a"
"""The one of the recording, in all paths and bodies."""
TIME = "2026-01-01T00:00:00Z"
"""Of all that the recording tells of when."""

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_VERSION = re.compile(r"&resourceVersion=\d+")
_OF_ONE_RUN = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "uid")
_ANNOTATIONS = ("gpufn.dev/", "autoscaling.knative.dev/")
_LIMITS = ("containerConcurrency", "responseStartTimeoutSeconds", "timeoutSeconds")


def is_watch(path: str) -> bool:
    """It goes on until whoever asked has seen enough."""
    return "watch=true" in path


def request(method: str, path: str, content_type: str | None, body: bytes) -> dict[str, Any]:
    """As kn said it, but for versions, ids and the state of an object that it has read and sends back."""
    kept: dict[str, Any] = {"method": method, "path": _VERSION.sub("", path)}
    if body:
        sent = json.loads(_TIME.sub(TIME, body.decode()))
        sent.pop("status", None)
        for name in _OF_ONE_RUN:
            sent.get("metadata", {}).pop(name, None)
        kept |= {"type": content_type, "body": sent}
    return kept


def answer(status: int, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """`body`: empty for a watch."""
    kept: dict[str, Any] = {"status": status}
    if "Warning" in headers:
        kept["warnings"] = headers["Warning"]
    if body:
        kept["body"] = _object(json.loads(_TIME.sub(TIME, body.decode())))
    return kept


def _object(value: Mapping[str, Any]) -> dict[str, Any]:
    kind = value["kind"]
    if kind == "Status":
        return {key: value[key] for key in ("kind", "status", "reason", "message") if key in value}
    if "items" in value:
        items = [_object({"kind": kind.removesuffix("List"), **item}) for item in value["items"]]
        return {"kind": kind, "items": sorted(items, key=lambda item: str(item["name"]))}
    metadata, spec = value["metadata"], value["spec"]
    kept = {"kind": kind, "name": metadata["name"], "annotations": _annotations(metadata)}
    if "template" in spec:
        kept["template"] = _template(spec["template"])
    if "containers" in spec:  # a Revision is its template
        kept |= _template(value)
    if "traffic" in spec:
        kept["traffic"] = spec["traffic"]
    return kept


def _template(template: Mapping[str, Any]) -> dict[str, Any]:
    spec = template["spec"]
    limits = {key: spec[key] for key in _LIMITS if key in spec}
    resources = spec["containers"][0].get("resources", {}).get("limits", {})
    return {"annotations": _annotations(template.get("metadata", {})), **limits, "limits": resources}


def _annotations(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = metadata.get("annotations", {})
    return {key: text for key, text in sorted(found.items()) if key.startswith(_ANNOTATIONS)}
