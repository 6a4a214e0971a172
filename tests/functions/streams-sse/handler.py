"""Server-sent events, as many as asked for, each sent before the next is made."""

import time


def handle(event, context):
    count, pause_s = int(event.query.get("count", 3)), float(event.query.get("pause", 0))
    return {"statusCode": 200, "body": events(count, pause_s), "headers": {"Content-Type": "text/event-stream"}}


def events(count, pause_s):
    for number in range(count):
        if number:
            time.sleep(pause_s)
        yield f"data: {number}\n\n"
