"""The function that both the watchdog and our entrypoint serve while their conversations are compared."""

import os
import socket

from flask import Response


def handle(event, context):
    if event.path == "/gate":
        with socket.socket(socket.AF_UNIX) as gate:  # says that the request is here, and waits to be let through
            gate.connect(os.environ["GATE"])
            gate.recv(1)
        return "through the gate"
    if event.path == "/broken":
        raise ValueError("as asked")
    return ANSWERS.get(event.path, seen)(event)


def seen(event):
    """What a handler sees of a request."""
    return {
        "statusCode": 200,
        "body": {
            "method": event.method,
            "path": event.path,
            "query": event.query.to_dict(flat=False),
            "body": event.body.decode(),
            "own": event.headers.getlist("X-Own"),
            "type": event.headers.get("Content-Type"),
            "host": event.headers.get("Host"),
            "call": event.headers.get("X-Call-Id") == "a-call",
        },
    }


def created(event):
    return {"statusCode": 201, "body": "made", "headers": {"Content-Type": "text/x-own", "X-Own": "yes"}}


def cookies(event):
    return {"statusCode": 200, "headers": [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]}


ANSWERS = {
    "/": lambda event: "hello",
    "/nothing": lambda event: None,
    "/created": created,
    "/cookies": cookies,
    "/moved": lambda event: {"statusCode": 302, "headers": {"Location": "/elsewhere"}},
    "/missing": lambda event: {"statusCode": 404, "body": "no such thing"},
    "/loading": lambda event: {"statusCode": 503, "body": "loading"},
    "/loaded": lambda event: {"statusCode": 200, "body": "loaded"},
    "/size": lambda event: str(len(event.body)),
    "/events": lambda event: Response((f"data: {n}\n\n" for n in range(3)), content_type="text/event-stream"),
    "/lines": lambda event: Response((f'{{"n": {n}}}\n' for n in range(3)), content_type="application/x-ndjson"),
}
