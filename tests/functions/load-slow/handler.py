"""Loads for half a second, so that requests have something to wait for."""

import time


def load(device):
    time.sleep(0.5)
    return "ready"


def handle(event, context):
    return context.model
