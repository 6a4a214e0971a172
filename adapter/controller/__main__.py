"""``python -m adapter.controller webhook`` and ``python -m adapter.controller controller``: two components of a cluster."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
from pathlib import Path

from adapter import logs
from adapter.controller.controller import run_controller
from adapter.controller.webhook import run_webhook
from adapter.errors import AdapterError

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
    logs.setup(level=os.environ.get("GPUFN_LOG_LEVEL", "INFO"))
    gc.set_threshold(*_SELDOM)
    try:
        if asked.component == "webhook":
            asyncio.run(run_webhook(port=asked.port, probes_port=asked.probes_port, tls_folder=asked.tls))
        else:
            asyncio.run(run_controller(probes_port=asked.probes_port))
    except AdapterError as error:
        print(error.to_text(), file=sys.stderr)  # noqa: T201  # whoever started it by hand reads this
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
