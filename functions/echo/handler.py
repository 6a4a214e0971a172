"""Answers what it is sent: an OpenFaaS python3-http handler as it is, without gpufn in mind."""


def handle(event, context):
    return {"statusCode": 200, "body": event.body, "headers": {"Content-Type": "text/plain"}}
