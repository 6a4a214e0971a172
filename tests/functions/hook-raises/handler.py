"""A hook that fails after the restore: that rung has failed, and the next one answers."""


def load(device):
    return "loaded"


def after_restore(model):
    raise ConnectionError("the database is gone")


def handle(event, context):
    return context.model
