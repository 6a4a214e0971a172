"""A function as OpenFaaS's Flask templates serve it: what the real watchdog is put in front of when it is recorded."""

import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

from flask import Flask, jsonify, request
from waitress import serve

spec = spec_from_file_location("handler", sys.argv[1])
handler = module_from_spec(spec)
spec.loader.exec_module(handler)
app = Flask(__name__)
METHODS = ["GET", "PUT", "POST", "PATCH", "DELETE"]


@app.route("/", defaults={"path": ""}, methods=METHODS)
@app.route("/<path:path>", methods=METHODS)
def call(path):
    event = SimpleNamespace(
        body=request.get_data(), headers=request.headers, method=request.method, query=request.args, path=request.path
    )
    result = handler.handle(event, SimpleNamespace(hostname=os.getenv("HOSTNAME", "localhost")))
    if result is None:
        return "", 200
    if not isinstance(result, dict):
        return result
    body = result.get("body", "")
    return (
        jsonify(body) if isinstance(body, dict) else str(body),
        result.get("statusCode", 200),
        result.get("headers", []),
    )


if __name__ == "__main__":
    # The watchdog passes SIGTERM on at once; a function that ends at it would cut its own requests off.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(app, host="127.0.0.1", port=int(sys.argv[2]), threads=8)
