"""The body as it came, every byte value possible."""


def handle(event, context):
    return {"statusCode": 200, "body": event.body, "headers": {"Content-Type": "application/octet-stream"}}
