"""Says which hooks ran, in their order. A connection is what hooks are for: closed before, opened after."""


class Model:
    def __init__(self):
        self.history = ["load"]


def load(device):
    return Model()


def before_snapshot(model):
    model.history.append("before_snapshot")


def after_restore(model):
    model.history.append("after_restore")


def handle(event, context):
    return {"statusCode": 200, "body": context.model.history}
