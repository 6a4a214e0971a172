"""``python -m adapter.openfaas``: the OpenFaaS provider and gateway of a cluster."""

from __future__ import annotations

import asyncio
import os
import sys

from adapter import logs
from adapter.errors import AdapterError
from adapter.openfaas.cluster_server import serve
from adapter.openfaas.cluster_settings import ProviderSettings


def main() -> int:
    try:
        settings = ProviderSettings.from_arguments(sys.argv[1:], os.environ)
        logs.setup(level=settings.log_level)
        os.umask(0o077)
        asyncio.run(serve(settings))
    except AdapterError as error:
        print(error.to_text(), file=sys.stderr)  # noqa: T201  # the last word of a process that ends
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
