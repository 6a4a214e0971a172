"""`load` never returns: ended after `limits.start_timeout`."""

import threading


def load(device):
    threading.Event().wait()


def handle(event, context):
    return "never"
