"""Reads a secret when asked, ``?name=token``: it must be there after a restore, and not in any snapshot."""

import hashlib


def load(device):
    return "model"


def handle(event, context):
    secret = context.secret(event.query["name"])
    return {"statusCode": 200, "body": {"digest": hashlib.sha256(secret.encode()).hexdigest()}}
