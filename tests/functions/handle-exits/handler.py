"""Ends the whole model process on ``?fail=1``: noticed, reported, and started again for the next request."""

import os


def handle(event, context):
    if "fail" in event.query:
        os._exit(9)
    return str(os.getpid())
