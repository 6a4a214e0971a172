"""``python -m adapter.runtime``: the entrypoint of a function image or folder."""

import time

BEGAN_NS = time.monotonic_ns()

import os  # noqa: E402  # the clock starts before anything is imported
import sys  # noqa: E402

from adapter.errors import AdapterError  # noqa: E402
from adapter.replica import ReplicaSettings  # noqa: E402
from adapter.runtime.entrypoint import Entrypoint  # noqa: E402


def main() -> int:
    """Exit code of the replica: 0 drained, 3 settings that cannot be used."""
    try:
        settings = ReplicaSettings.from_env(os.environ)
    except AdapterError as error:
        print(f"gpufn: {error.message} {error.why} {error.hint}", file=sys.stderr)
        return error.exit_code
    return Entrypoint(settings, dict(os.environ), BEGAN_NS).run()


if __name__ == "__main__":
    sys.exit(main())
