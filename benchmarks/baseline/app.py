"""A function's handler under Flask, as one would write it by hand: what gpufn is measured against.

Follows OpenFaaS's python3-http template (index.py of openfaas/python-flask-template).
"""

import importlib.util
import os
import sys
from types import SimpleNamespace

from flask import Flask, jsonify, request

folder = os.environ["FUNCTION_FOLDER"]
sys.path.insert(0, folder)
spec = importlib.util.spec_from_file_location("handler", os.path.join(folder, "handler.py"))
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)

app = Flask(__name__)
context = SimpleNamespace(model=handler.load("cpu") if hasattr(handler, "load") else None)


@app.route("/", defaults={"path": ""}, methods=["GET", "PUT", "POST", "PATCH", "DELETE"])
@app.route("/<path:path>", methods=["GET", "PUT", "POST", "PATCH", "DELETE"])
def call_handler(path):
    event = SimpleNamespace(
        body=request.get_data(), headers=request.headers, method=request.method, query=request.args, path=request.path
    )
    answer = handler.handle(event, context)
    body = answer.get("body", "")
    if isinstance(body, dict | list):
        body = jsonify(body)
    return body, answer.get("statusCode", 200), answer.get("headers", {})
