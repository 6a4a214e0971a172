"""A Llama of the shape in config.json with random weights: it says nothing of sense, at the speed of one that does.

{"tokens": 4} in; the numbers of the likeliest tokens out, one a line, each as soon as it is there
"""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

CONFIG = Path(__file__).parent / "config.json"
PROMPT = [1, 17, 289, 4913]


def load(device):
    torch.manual_seed(7)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIG), dtype=torch.bfloat16).eval()


def build(device):
    """The same without its weights: gpufn brings those from its weight snapshot."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIG), dtype=torch.bfloat16).eval()


def handle(event, context):
    count = min(int(json.loads(event.body)["tokens"]), 64)
    return {"statusCode": 200, "body": tokens(context.model, count), "headers": {"Content-Type": "text/plain"}}


@torch.inference_mode()
def tokens(network, count):
    given, cache = torch.tensor([PROMPT], device=network.device), DynamicCache()
    for _ in range(count):
        given = network(given, cache=cache, use_cache=True).logits[:, -1].argmax(dim=-1, keepdim=True)
        yield f"{given.item()}\n"
