"""How commands read a ledger: that of a state folder, without `gpufn up` and while it runs, or that of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter.cli.cluster import Cluster
from adapter.cli.state import state_folder
from adapter.ledger.client import Reader, RemoteLedger
from adapter.ledger.store import FILE_NAME, Ledger, ledger_url


@contextmanager
def open_ledger(state: Path | None, cluster: Cluster | None = None) -> Iterator[Reader | None]:
    """Of `cluster`, or else of a state folder; None where nothing has been written yet. A running `gpufn up` may go on."""
    if cluster is not None:
        with _of_cluster(cluster) as reader:
            yield reader
        return
    folder = state_folder(state)
    if not (folder / FILE_NAME).exists():
        yield None
        return
    ledger = Ledger.open(ledger_url(folder))
    try:
        yield ledger
    finally:
        ledger.close()


@contextmanager
def _of_cluster(cluster: Cluster) -> Iterator[Reader]:
    with cluster.connected() as connection:
        from adapter.cli.cluster_ledger import ClusterLedger

        ledger = ClusterLedger(connection.api)
        yield RemoteLedger(lambda path, query: connection.wait(ledger.get(path, query)))
