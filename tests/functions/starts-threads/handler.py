"""`load` leaves threads running: they run on after a restore."""

import threading
import time


class Ticker:
    def __init__(self):
        self.ticks = 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            time.sleep(0.01)
            self.ticks += 1


def load(device):
    return Ticker()


def handle(event, context):
    before = context.model.ticks
    deadline = time.monotonic() + 5
    while context.model.ticks == before and time.monotonic() < deadline:
        time.sleep(0.005)
    return {"statusCode": 200, "body": {"running": context.model.ticks > before}}
