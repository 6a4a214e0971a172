"""A stream that fails half-way: the status is sent already, so the connection must not end as if all were well."""


def handle(event, context):
    return {"statusCode": 200, "body": broken(), "headers": {"Content-Type": "text/plain"}}


def broken():
    yield "the beginning"
    raise RuntimeError("the end is missing")
