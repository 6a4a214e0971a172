"""An answer that is none."""


def handle(event, context):
    return object()
