"""``python -m adapter.controller webhook`` and ``python -m adapter.controller controller``: two components of a cluster."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from adapter.cluster.component import run
from adapter.controller.controller import run_controller
from adapter.controller.webhook import run_webhook

_TLS_FOLDER = Path("/var/run/secrets/gpufn.dev/tls")
_SELDOM = (50_000, 50, 100)
"""Thresholds of the garbage collector: caches of thousands of nodes make a full collection long, and hold no cycles."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m adapter.controller")
    components = parser.add_subparsers(dest="component", required=True)
    for name in ("webhook", "controller"):
        component = components.add_parser(name)
        component.add_argument("--probes-port", type=int, default=8080, help="for /healthz, /readyz and /metrics")
    components.choices["webhook"].add_argument("--port", type=int, default=8443, help="for the API server's reviews")
    components.choices["webhook"].add_argument("--tls", type=Path, default=_TLS_FOLDER, help="has tls.crt and tls.key")
    asked = parser.parse_args()
    gc.set_threshold(*_SELDOM)
    if asked.component == "webhook":
        return run(lambda: run_webhook(port=asked.port, probes_port=asked.probes_port, tls_folder=asked.tls))
    return run(lambda: run_controller(probes_port=asked.probes_port))


if __name__ == "__main__":
    sys.exit(main())
