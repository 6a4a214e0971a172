"""What the desired state of a cluster looks like in its API: records of functions, and namespaces of functions. Pure.

ConfigMap function-<name>    labels faas_function=<name>, app.kubernetes.io/managed-by=gpufn
  deployment                 what a deploy sent, as JSON
  revision                   counts its deploys
  digest                     of `deployment`: who edits that by hand need not know of the other two
  image                      what was found out of its image then, as JSON
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter.cluster.resources import CONFIG_MAPS
from adapter.errors import ConfigError
from adapter.hosts.kubernetes_pods import MANAGED_BY, MANAGER, record_name
from adapter.keys import OPENFAAS_LABEL, SNAPSHOTS_LABEL
from adapter.openfaas.catalog import Entry, ImageFacts
from adapter.openfaas.wire import FunctionDeployment

NAMESPACE_MARK = "openfaas"
"""Label or annotation of a namespace of functions: ``1`` or ``true``."""


# Records ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """A ConfigMap of ours. `problem` says why it cannot be used; then there is no entry."""

    key: str
    uid: str
    version: str
    entry: Entry | None
    is_edited: bool = False
    problem: str = ""


def record_of(deployment: FunctionDeployment, revision: int, image: ImageFacts | None) -> dict[str, Any]:
    """The ConfigMap of a function."""
    text = json.dumps(deployment.to_json(), indent=1, sort_keys=True)
    data = {"deployment": text, "revision": str(revision), "digest": _digest(text)}
    if image is not None:
        data["image"] = json.dumps(image.to_json(), indent=1)
    labels = {OPENFAAS_LABEL: deployment.service, MANAGED_BY: MANAGER}
    name = record_name(deployment.service)
    return CONFIG_MAPS.body(name, deployment.namespace, metadata={"labels": labels}, data=data)


def read_if_record(data: Mapping[str, Any]) -> Record | None:
    """Of the API server's JSON; None for somebody else's ConfigMap, and for a copy of a record, with its labels."""
    metadata = data["metadata"]
    labels = metadata.get("labels") or {}
    is_ours = labels.get(MANAGED_BY) == MANAGER and OPENFAAS_LABEL in labels  # as `SELECTOR` has it
    return read_record(data) if is_ours and metadata["name"].startswith(record_name("")) else None


def read_record(data: Mapping[str, Any]) -> Record:
    """Of the API server's JSON, whose name says whose record it is."""
    metadata, said = data["metadata"], data.get("data") or {}
    name, namespace = metadata["name"].removeprefix(record_name("")), metadata["namespace"]
    key, uid, version = f"{name}.{namespace}", metadata["uid"], metadata["resourceVersion"]
    try:
        text = said["deployment"]
        deployment = FunctionDeployment.from_json(json.loads(text))
        if (deployment.service, deployment.namespace) != (name, namespace):
            raise ValueError(f"it says that it is {deployment.key}")  # told below, like the others
        revision, is_edited = int(said["revision"]), said.get("digest") != _digest(text)
        image = ImageFacts.from_json(json.loads(said["image"])) if said.get("image") else None
        entry = Entry(deployment, revision, metadata["creationTimestamp"], image)
    except ConfigError as error:
        return Record(key, uid, version, None, problem=f"{error.message} {error.why}".strip())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Record(key, uid, version, None, problem=f"{type(error).__name__}: {error}")
    return Record(key, uid, version, entry, is_edited)


def is_before(version: str, other: str) -> bool:
    """Whether a resourceVersion is older than another of the same kind; false where they are no numbers."""
    return version.isdecimal() and other.isdecimal() and int(version) < int(other)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# Namespaces ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str
    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def keeps_snapshots(self) -> bool:
        return dict(self.labels).get(SNAPSHOTS_LABEL) == "enabled"


def read_namespace(data: Mapping[str, Any], default: str) -> Namespace | None:
    """One of functions; None where it is none, or goes."""
    metadata = data["metadata"]
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    marks = (labels.get(NAMESPACE_MARK), annotations.get(NAMESPACE_MARK))
    if "deletionTimestamp" in metadata or not ({"1", "true"} & set(marks) or metadata["name"] == default):
        return None
    return Namespace(metadata["name"], tuple(labels.items()), tuple(annotations.items()))


def marked(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As metadata of a namespace of functions; the mark as OpenFaaS has it, and as a selector can find it."""
    return {kind: {**facts.get(kind, {}), NAMESPACE_MARK: "1"} for kind in ("annotations", "labels")}
