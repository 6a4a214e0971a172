"""Fails on its own example, and on nothing else."""


def load(device):
    return "model"


def handle(event, context):
    if event.body == b"example":
        raise RuntimeError("not this one")
    return "fine"
