"""Holds device memory with a pattern, through the CUDA driver's own bindings: says whether it is still there.

Works on a simulated GPU as on a real one; needs cuda-bindings.
"""

import os

from cuda.bindings import driver

BYTES = 4 << 20
PATTERN = bytes(range(256)) * (BYTES // 256)


def ok(answer):
    if int(answer[0]) != 0:
        raise RuntimeError(answer[0].name)
    return answer[1] if len(answer) == 2 else answer[1:]


def load(device):
    ok(driver.cuInit(0))
    context = ok(driver.cuDevicePrimaryCtxRetain(int(device.partition(":")[2] or 0)))
    ok(driver.cuCtxSetCurrent(context))
    address = int(ok(driver.cuMemAlloc(BYTES)))
    ok(driver.cuMemcpyHtoD(address, PATTERN, BYTES))
    return context, address


def handle(event, context):
    cuda, address = context.model
    ok(driver.cuCtxSetCurrent(cuda))
    back = bytearray(BYTES)
    ok(driver.cuMemcpyDtoH(back, address, BYTES))
    return {"statusCode": 200, "body": {"whole": back == PATTERN, "address": address, "process": os.getpid()}}
