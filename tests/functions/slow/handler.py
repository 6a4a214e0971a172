"""Takes as long as it is asked to: ``?seconds=1.5``."""

import time


def handle(event, context):
    seconds = float(event.query.get("seconds", 0))
    time.sleep(seconds)
    return f"slept {seconds:g}"
