"""Numbers from every generator there is: two replicas of one snapshot must never answer alike."""

import os
import random
import ssl
import uuid

try:
    import numpy as np
except ImportError:
    np = None
try:
    import torch
except ImportError:
    torch = None


class Model:
    def __init__(self):
        self.random = random.Random(1)  # the function's own: only its hook can know of it
        self.numpy = np.random.default_rng(1) if np else None


def load(device):
    random.seed(1)
    if np:
        np.random.seed(1)  # many libraries draw from it
    if torch:
        torch.manual_seed(1)
    return Model()


def after_restore(model):
    model.random = random.Random()
    model.numpy = np.random.default_rng() if np else None


def handle(event, context):
    model = context.model
    drawn = {
        "random": random.random(),
        "own": model.random.random(),
        "os": os.urandom(8).hex(),
        "ssl": ssl.RAND_bytes(8).hex(),
        "uuid": uuid.uuid4().hex,
    }
    if np:
        drawn |= {"numpy": float(np.random.random()), "numpy_own": float(model.numpy.random())}
    if torch:
        drawn["torch"] = torch.rand(()).item()
    return {"statusCode": 200, "body": drawn}
