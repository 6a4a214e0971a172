"""OpenFaaS's python3-http shape with all that an event and an answer can have."""


def handle(event, context):
    return {
        "statusCode": 203,
        "body": {
            "method": event.method,
            "path": event.path,
            "query": dict(event.query),
            "body": event.body.decode(),
            "header": event.headers.get("X-Test"),
            "hostname": bool(context.hostname),
        },
        "headers": {"X-Answered-By": "template-style"},
    }
