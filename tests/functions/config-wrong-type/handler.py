"""A handler that is right beside a `gpufn.toml` that is not."""


def handle(event, context):
    return "never"
