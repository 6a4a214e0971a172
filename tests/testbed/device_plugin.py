"""A device plugin for GPUs that are pretended: `python -m tests.testbed.device_plugin GPU-… GPU-…`, on a node.

The kubelet hands them out as it does real ones, tells them over its pod-resources socket, and a container finds its own
in NVIDIA_VISIBLE_DEVICES. https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/device-plugins/
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

RESOURCE = "nvidia.com/gpu"
FOLDER = Path("/var/lib/kubelet/device-plugins")
SOCKET = "gpufn-testbed.sock"
UNHEALTHY = FOLDER / "gpufn-testbed.unhealthy"
"""A file that tests write: identifiers of GPUs that are out of order, one a line."""
PACKAGE = "v1beta1"
LOOK_AGAIN_S = 0.2


def _messages(**messages: dict[str, str]) -> dict[str, Any]:
    """Message classes from fields in the order of their numbers: name → type, ``[]`` for repeated, as in the .proto.

    A map is what it is on the wire: repeated entries with `key` and `value`."""
    file = descriptor_pb2.FileDescriptorProto(name="testbed.proto", package=PACKAGE, syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    scalars = {"string": kinds.TYPE_STRING, "bool": kinds.TYPE_BOOL}
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            base = kind.removesuffix("[]")
            label = kinds.LABEL_REPEATED if base != kind else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            added.type = scalars.get(base, kinds.TYPE_MESSAGE)
            if base not in scalars:
                added.type_name = f".{PACKAGE}.{base}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in messages}


M = _messages(
    Empty={},
    DevicePluginOptions={"pre_start_required": "bool", "get_preferred_allocation_available": "bool"},
    RegisterRequest={"version": "string", "endpoint": "string", "resource_name": "string"},
    Device={"ID": "string", "health": "string"},
    ListAndWatchResponse={"devices": "Device[]"},
    ContainerAllocateRequest={"devices_ids": "string[]"},
    AllocateRequest={"container_requests": "ContainerAllocateRequest[]"},
    EnvironmentEntry={"key": "string", "value": "string"},
    ContainerAllocateResponse={"envs": "EnvironmentEntry[]"},
    AllocateResponse={"container_responses": "ContainerAllocateResponse[]"},
)


class Plugin:
    """Answers the kubelet for these GPUs."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self._gpus = gpus

    async def options(self, request: Any, context: Any) -> Any:
        return M["DevicePluginOptions"]()

    async def list_and_watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        known: set[str] | None = None
        while True:
            bad = set(UNHEALTHY.read_text().split()) if UNHEALTHY.exists() else set()
            if bad != known:
                known = bad
                health = {gpu: "Unhealthy" if gpu in bad else "Healthy" for gpu in self._gpus}
                devices = [M["Device"](ID=gpu, health=state) for gpu, state in health.items()]
                yield M["ListAndWatchResponse"](devices=devices)
            await asyncio.sleep(LOOK_AGAIN_S)

    async def allocate(self, request: Any, context: Any) -> Any:
        answer = M["AllocateResponse"]()
        for container in request.container_requests:
            gpus = ",".join(container.devices_ids)
            answer.container_responses.add().envs.add(key="NVIDIA_VISIBLE_DEVICES", value=gpus)
        return answer

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            f"{PACKAGE}.DevicePlugin",
            {
                "GetDevicePluginOptions": grpc.unary_unary_rpc_method_handler(self.options, *_codec("Empty")),
                "ListAndWatch": grpc.unary_stream_rpc_method_handler(self.list_and_watch, *_codec("Empty")),
                "Allocate": grpc.unary_unary_rpc_method_handler(self.allocate, *_codec("AllocateRequest")),
            },
        )


def _codec(request: str) -> tuple[Any, Any]:
    return M[request].FromString, lambda message: message.SerializeToString()


async def _register() -> None:
    request = M["RegisterRequest"](version=PACKAGE, endpoint=SOCKET, resource_name=RESOURCE)
    async with grpc.aio.insecure_channel(f"unix://{FOLDER}/kubelet.sock") as channel:
        call: Any = channel.unary_unary(
            f"/{PACKAGE}.Registration/Register", lambda message: message.SerializeToString(), M["Empty"].FromString
        )
        await call(request, timeout=5)


def _identity(socket: Path) -> int:
    """Of the kubelet's socket; a kubelet that starts makes a new one, and removes those of plugins. 0: none."""
    try:
        return socket.stat().st_ctime_ns
    except FileNotFoundError:
        return 0


async def serve(gpus: Sequence[str]) -> None:
    """Registers with each kubelet that starts here; never returns."""
    served = 0
    server: grpc.aio.Server | None = None
    while True:
        kubelet = _identity(FOLDER / "kubelet.sock")
        if kubelet and kubelet != served:
            try:
                if server is not None:
                    await server.stop(None)
                server = grpc.aio.server()
                server.add_generic_rpc_handlers((Plugin(gpus).handler(),))
                server.add_insecure_port(f"unix://{FOLDER / SOCKET}")
                await server.start()
                await _register()
                served = kubelet
                print(f"registered {len(gpus)} GPUs", flush=True)
            except (grpc.RpcError, RuntimeError) as error:
                print(f"not registered: {error}", flush=True)
        await asyncio.sleep(LOOK_AGAIN_S)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
