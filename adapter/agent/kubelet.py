"""Which devices the kubelet gave to which container: its pod-resources API, over gRPC on a socket of the node.

The only module that imports grpc. The messages are made here from what of them we read:
https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/device-plugins/#monitoring-device-plugin-resources
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from adapter.cluster.inventory import is_gpu
from adapter.errors import Unavailable

SOCKET = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
_PACKAGE, _SERVICE = "v1", "v1.PodResourcesLister"
_LIMIT_S = 5.0
_ANSWER_LIMIT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Allocation:
    """`devices`: ``(namespace, pod, container)`` → UUID → share of it, 0 to 1. `shares`: of each device there is, what
    one unit of it is: less than 1 where the device plugin sells one GPU several times.
    """

    devices: Mapping[tuple[str, str, str], Mapping[str, float]] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)


class Kubelet:
    """One node's kubelet; every call makes a connection of its own, since a restarted kubelet has a new socket."""

    def __init__(self, socket: Path = SOCKET) -> None:
        self._socket = socket

    async def allocation(self) -> Allocation:
        """What is given to whom now. Raises `Unavailable`."""
        try:
            async with grpc.aio.insecure_channel(
                f"unix://{self._socket}", options=[("grpc.max_receive_message_length", _ANSWER_LIMIT_BYTES)]
            ) as channel:
                there = await _call(channel, "GetAllocatableResources", "AllocatableResourcesRequest")
                given = await _call(channel, "List", "ListPodResourcesRequest")
        except grpc.aio.AioRpcError as exc:
            raise Unavailable(
                "The kubelet does not say which devices containers have.",
                why=f"{exc.code().name}: {exc.details()}",
                hint=f"The agent needs {self._socket.parent} of its node.",
                code="kubelet-unreachable",
            ) from exc
        return _allocation(there, given)


async def _call(channel: grpc.aio.Channel, method: str, request: str) -> Any:
    call: Any = channel.unary_unary(
        f"/{_SERVICE}/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=MESSAGES[_ANSWERS[method]].FromString,
    )
    return await call(MESSAGES[request](), timeout=_LIMIT_S)


def _allocation(there: Any, given: Any) -> Allocation:
    units = Counter(_uuid(name) for name in _ids(there.devices))
    shares = {uuid: 1 / count for uuid, count in units.items()}
    devices: dict[tuple[str, str, str], dict[str, float]] = {}
    for pod in given.pod_resources:
        for container in pod.containers:
            held = Counter(_uuid(name) for name in _ids(container.devices))
            if held:
                devices[pod.namespace, pod.name, container.name] = {
                    uuid: min(1.0, count * shares.get(uuid, 1.0)) for uuid, count in held.items()
                }
    return Allocation(devices, shares)


def _ids(devices: Iterable[Any]) -> Iterable[str]:
    return (name for entry in devices if is_gpu(entry.resource_name) for name in entry.device_ids)


def _uuid(name: str) -> str:
    """``GPU-…::3`` is the third unit of a GPU that is sold several times."""
    return name.partition("::")[0]


_ANSWERS = {"List": "ListPodResourcesResponse", "GetAllocatableResources": "AllocatableResourcesResponse"}


def _messages(**messages: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """Message classes from their fields: name → number and type, with ``[]`` for what is repeated."""
    field_kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="gpufn/podresources.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for of, (number, kind) in fields.items():
            base = kind.removesuffix("[]")
            added = message.field.add(name=of, number=number)
            added.label = field_kind.LABEL_REPEATED if base != kind else field_kind.LABEL_OPTIONAL
            if base == "string":
                added.type = field_kind.TYPE_STRING
            else:
                added.type, added.type_name = field_kind.TYPE_MESSAGE, f".{_PACKAGE}.{base}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in messages
    }


MESSAGES = _messages(
    ListPodResourcesRequest={},
    ListPodResourcesResponse={"pod_resources": (1, "PodResources[]")},
    PodResources={"name": (1, "string"), "namespace": (2, "string"), "containers": (3, "ContainerResources[]")},
    ContainerResources={"name": (1, "string"), "devices": (2, "ContainerDevices[]")},
    ContainerDevices={"resource_name": (1, "string"), "device_ids": (2, "string[]")},
    AllocatableResourcesRequest={},
    AllocatableResourcesResponse={"devices": (1, "ContainerDevices[]")},
)
