def load(device):
    """Runs once, before the first request; its result is in the snapshot that replicas wake up from."""
    return "Hello from gpufn!"


def handle(event, context):
    return {"statusCode": 200, "body": context.model}
