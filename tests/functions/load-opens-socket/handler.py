"""`load` keeps a TCP connection open: no process snapshot can be taken, and every request is answered all the same."""

import socket


def load(device):
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    return listener, client


def handle(event, context):
    listener, _ = context.model
    return {"statusCode": 200, "body": {"port": listener.getsockname()[1]}}
