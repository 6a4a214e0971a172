"""A kubelet's pod-resources API with whatever devices a test gives away; tests/cluster asks real ones."""

from __future__ import annotations

from contextlib import asynccontextmanager

import grpc

from adapter.agent.kubelet import MESSAGES, Kubelet


def devices(resource, *names):
    return MESSAGES["ContainerDevices"](resource_name=resource, device_ids=names)


@asynccontextmanager
async def kubelet(path, allocatable, pods):
    async def resources(_request, _context):
        return MESSAGES["AllocatableResourcesResponse"](devices=allocatable)

    async def listed(_request, _context):
        answer = MESSAGES["ListPodResourcesResponse"]()
        for (namespace, pod, container), given in pods.items():
            of = answer.pod_resources.add(name=pod, namespace=namespace)
            of.containers.add(name=container, devices=given)
        return answer

    def method(handler, request):
        return grpc.unary_unary_rpc_method_handler(
            handler,
            request_deserializer=MESSAGES[request].FromString,
            response_serializer=lambda m: m.SerializeToString(),
        )

    handlers = {
        "GetAllocatableResources": method(resources, "AllocatableResourcesRequest"),
        "List": method(listed, "ListPodResourcesRequest"),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1.PodResourcesLister", handlers),))
    server.add_insecure_port(f"unix://{path}")
    await server.start()
    yield Kubelet(path)
    await server.stop(None)
