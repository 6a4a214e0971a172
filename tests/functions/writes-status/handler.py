"""Writes to descriptor 3, which is not its own: harms nobody."""

import os

os.write(3, b'nonsense\n{"kind": "phase"}\n[1]\n')


def load(device):
    os.write(3, b"more\n")
    return "loaded"


def handle(event, context):
    return context.model
