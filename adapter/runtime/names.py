"""Names of the tensors of the model that a handler's `build` makes: what GGUF, which has names of its own, becomes.

    python -m adapter.runtime.names FOLDER      one JSON line on stdout: the list, or ``{"error": …}`` with exit code 1

For builders, in the function's interpreter. Runs the handler's import and `build`, nothing else of it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from adapter.errors import AdapterError, HandlerError
from adapter.runtime.handler import import_handler
from adapter.snapshot.layout import slots_of


def names_of(folder: Path) -> list[str]:
    """Raises `HandlerError`."""
    handler = import_handler(folder)
    if not handler.shape.has_build:
        raise HandlerError(
            "The handler defines no `build`.",
            why="GGUF is dequantised into the model that it makes.",
            hint='Define `build`, or keep the file as it is: dtype = "keep" under [weights].',
            code="no-build",
        )
    return [slot.name for slot in slots_of(handler.make("build", "cpu"))]


def main(arguments: list[str]) -> int:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the handler prints
            said: object = names_of(Path(arguments[0]))
        failed = False
    except AdapterError as error:
        said, failed = error.to_json(), True
    print(json.dumps(said), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
