"""A cluster for the command line: a pretended API server in a thread, a kubeconfig, and what nodes and pods look like."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.fakes.api_server import FakeApiServer, status

GI = 2**30
LEDGER = "/api/v1/namespaces/gpufn-system/services/https:gpufn-ledger:8443/proxy"
TOKEN = "/api/v1/namespaces/gpufn-system/serviceaccounts/gpufn-reader/token"


class FakeCluster(FakeApiServer):
    """`denied` are what the caller may not do, as ``verb resource``; `ledger` answers by path, and wants its token."""

    def __init__(self) -> None:
        super().__init__()
        self.denied: set[str] = set()
        self.ledger: dict[str, Any] = {}
        self.asked: list[dict[str, str]] = []
        """Queries that reached the ledger."""
        self.kubeconfig = Path()
        self.put_now("/version", {"major": "1", "minor": "36", "gitVersion": "v1.36.3"})
        self.put_now("/api/v1/namespaces/default", {"metadata": {"name": "default", "labels": {}}})

    def put_now(self, path: str, value: dict) -> None:
        """Before anybody asks."""
        name = path.rsplit("/", 1)[1]
        value.setdefault("metadata", {}).setdefault("name", name)
        value["metadata"].setdefault("uid", f"uid-{name}")
        if "/namespaces/" in path and path.count("/") > 5:
            value["metadata"].setdefault("namespace", path.split("/namespaces/")[1].split("/", maxsplit=1)[0])
        self.objects[path] = value

    def _read(self, request: web.Request) -> web.Response:
        plural = request.path.rstrip("/").split("/")[-1]
        if f"list {plural}" in self.denied:
            return status(403, "Forbidden", f"{plural} is forbidden")
        if request.path.startswith(LEDGER):
            return self._of_ledger(request)
        response = super()._read(request)
        selector = request.query.get("labelSelector")
        return _selected(response, selector) if selector else response

    def _of_ledger(self, request: web.Request) -> web.Response:
        if not self.ledger:
            return status(503, "ServiceUnavailable", 'no endpoints available for service "https:gpufn-ledger:8443"')
        assert request.headers["X-Gpufn-Token"] == "for-the-ledger"
        self.asked.append(dict(request.query))
        return web.json_response(self.ledger[request.path.removeprefix(LEDGER)])

    async def _write(self, request: web.Request, body: Any) -> web.StreamResponse:
        if request.path.endswith("/selfsubjectaccessreviews"):
            asked = body["spec"]["resourceAttributes"]
            allowed = f"{asked['verb']} {asked['resource']}" not in self.denied
            return web.json_response({**body, "status": {"allowed": allowed}}, status=201)
        if request.path == TOKEN:
            if "create serviceaccounts" in self.denied:
                return status(403, "Forbidden", "cannot create resource serviceaccounts/token")
            assert body["spec"]["audiences"] == ["gpufn-ledger"]
            return web.json_response({**body, "status": {"token": "for-the-ledger"}}, status=201)
        raise AssertionError(f"{request.method} {request.path}: these commands change nothing")


def _selected(response: web.Response, selector: str) -> web.Response:
    import json

    found = json.loads(response.text or "{}")
    for term in selector.split(","):
        key, equals, value = term.partition("=")
        found["items"] = [
            item
            for item in found["items"]
            for labels in [item["metadata"].get("labels") or {}]
            if (labels.get(key) == value if equals else key in labels)
        ]
    return web.json_response(found)


@contextmanager
def serving(cluster: FakeCluster, folder: Path):
    """While it lasts, `cluster.kubeconfig` leads there."""
    loop, ready, over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with cluster.serving():
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    cluster.kubeconfig = folder / "kubeconfig"
    cluster.kubeconfig.write_text(yaml.safe_dump(kubeconfig(cluster.url)))
    try:
        yield cluster
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def kubeconfig(url: str, namespace: str = "default") -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {"token": "t"}}],
        "contexts": [
            {"name": "here", "context": {"cluster": "fake", "user": "me", "namespace": namespace}},
            {"name": "other", "context": {"cluster": "fake", "user": "me", "namespace": "elsewhere"}},
        ],
    }


# What there is --------------------------------------------------------------------------------------------------------


def node(name: str, gpus: int = 1, model: str = "NVIDIA-L4", *, cordoned: bool = False, **labels: str) -> dict:
    memory = {"nvidia.com/gpu.product": model, "nvidia.com/gpu.memory": "24576"} if gpus and model else {}
    allocatable = {"cpu": "8", "memory": "32Gi", "pods": "110", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **memory, **labels}},
        "spec": {"unschedulable": True} if cordoned else {},
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def gpu_node(*snapshots: tuple[str, int], restores: bool = True, why_not: str = "", **status_fields: Any) -> dict:
    said = [{"name": name, "bytes": size} for name, size in snapshots]
    restore = {"works": restores, **({} if restores else {"whyNot": "No CRIU."})}
    return {"status": {"driver": "580.1", "whyNot": why_not, "snapshots": said, "restore": restore, **status_fields}}


def pod(function: str = "", node_name: str = "", *, gpus: int = 0, framework: str = "knative", **metadata: Any) -> dict:
    label = {"knative": "serving.knative.dev/service", "openfaas": "faas_function", "plain": "gpufn.dev/function"}
    labels = {label[framework]: function} if function else {}
    if framework == "knative" and function:
        labels["serving.knative.dev/revision"] = f"{function}-00001"
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    requests = {"cpu": "1", "memory": "1Gi"}
    return {
        "metadata": {"labels": labels, "annotations": {}, **metadata},
        "spec": {
            "containers": [{"name": "user-container", "resources": {"limits": limits, "requests": requests}}],
            **({"nodeName": node_name} if node_name else {}),
        },
        "status": {"phase": "Running" if node_name else "Pending"},
    }


def agent_pod(node_name: str, *, ready: bool = True) -> dict:
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "gpufn", "app.kubernetes.io/component": "agent"}},
        "spec": {"nodeName": node_name, "containers": [{"name": "agent"}]},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": str(ready)}]},
    }
