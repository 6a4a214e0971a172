"""A network whose weights can be mapped; its `build` must not be asked for numbers. Needs torch."""

import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
        self.register_buffer("shift", torch.full((2,), 0.25), persistent=False)

    def forward(self, x):
        return self.layers(x) + self.shift


def load(device):
    torch.manual_seed(7)
    return Network().to(device).eval()


def build(device):
    with torch.device("meta"):
        return Network()


def handle(event, context):
    with torch.inference_mode():
        return {"statusCode": 200, "body": context.model(torch.arange(8.0)).tolist()}
