"""The ledger service's settings."""

from __future__ import annotations

from dataclasses import dataclass

from adapter.settings import as_port, as_text, required, variable

TLS_FOLDER = "/var/run/secrets/gpufn.dev/tls"
"""Where a pod of ours has the certificate that it serves with."""


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """See `adapter.settings`. The database's URL has its password: never logged."""

    url: str = required(
        "GPUFN_LEDGER", as_text, "the database, postgresql://USER:PASSWORD@HOST/DATABASE, from a Secret"
    )
    port: int = variable("GPUFN_LEDGER_PORT", as_port, 8443, "port of the service")
    status_port: int = variable("GPUFN_STATUS_PORT", as_port, 8080, "port of metrics and probes")
    tls_dir: str = variable(
        "GPUFN_TLS_DIR", str, TLS_FOLDER, "folder with tls.crt and tls.key; empty: plain HTTP, on one's own machine"
    )
