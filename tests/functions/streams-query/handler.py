"""Reads the query while it streams, when its view has long returned."""


def handle(event, context):
    return (event.query["word"] for _ in range(3))
