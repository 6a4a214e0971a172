"""Prints everywhere: all of it is the function's log, none of it may be taken for a message of the shim's."""

import os
import sys

print("at import, on standard output")
print('{"event": "serving", "at_ns": 1}')


def load(device):
    print("in load, on standard error", file=sys.stderr)
    os.write(1, b"in load, past Python's buffers\n")
    os.write(1, b"without an end of line")
    return "model"


def handle(event, context):
    print("in handle")
    return context.model
