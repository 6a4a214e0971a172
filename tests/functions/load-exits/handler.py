"""`load` ends the process with a code of its own, past every exception handler."""

import os


def load(device):
    os._exit(7)


def handle(event, context):
    return "never"
