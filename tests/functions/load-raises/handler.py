"""`load` raises: no rung can work, and the caller is told what was raised, with the user's frames only."""


def load(device):
    raise ValueError("the weights are not here")


def handle(event, context):
    return "never"
