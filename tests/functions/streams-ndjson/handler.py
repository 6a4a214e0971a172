"""A generator as the whole result of `handle`, in lines of JSON."""

import json


def handle(event, context):
    lines = (json.dumps({"line": number}) + "\n" for number in range(int(event.query.get("count", 3))))
    return {"statusCode": 200, "body": lines, "headers": {"Content-Type": "application/x-ndjson"}}
