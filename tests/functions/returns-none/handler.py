"""Nothing to say: an empty answer."""


def handle(event, context):
    return None
