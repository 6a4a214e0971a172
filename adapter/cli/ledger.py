"""How commands read the ledger of a state folder: without `gpufn up`, and while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter.cli.state import state_folder
from adapter.ledger.store import FILE_NAME, Ledger, ledger_url


@contextmanager
def open_ledger(state: Path | None) -> Iterator[Ledger | None]:
    """The ledger of a state folder; None where nothing has been written yet. A running `gpufn up` may go on."""
    folder = state_folder(state)
    if not (folder / FILE_NAME).exists():
        yield None
        return
    ledger = Ledger.open(ledger_url(folder))
    try:
        yield ledger
    finally:
        ledger.close()
