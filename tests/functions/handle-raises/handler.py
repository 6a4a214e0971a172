"""Raises on ``?fail=1``; the next request finds it unharmed."""


def handle(event, context):
    if "fail" in event.query:
        raise KeyError("what the request did not have")
    return "fine"
