"""The ledger service's settings, from its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapter.errors import ConfigError

TLS_FOLDER = "/var/run/secrets/gpufn.dev/tls"
"""Where a pod of ours has the certificate that it serves with."""


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """`url` is the database's, with its password: never logged. `tls_dir`: a folder with ``tls.crt`` and ``tls.key``;
    empty: plain HTTP, for a machine of one's own."""

    url: str
    port: int
    status_port: int
    tls_dir: str

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> LedgerSettings:
        """Raises `ConfigError`."""
        url = environ.get("GPUFN_LEDGER", "")
        if not url:
            raise ConfigError(
                "The ledger has no database.",
                why="GPUFN_LEDGER is not set.",
                hint="Set it to postgresql://USER:PASSWORD@HOST/DATABASE, from a Secret.",
                code="no-ledger-url",
            )
        return cls(
            url=url,
            port=_port(environ, "GPUFN_LEDGER_PORT", 8443),
            status_port=_port(environ, "GPUFN_STATUS_PORT", 8080),
            tls_dir=environ.get("GPUFN_TLS_DIR", TLS_FOLDER),
        )


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal() or int(text) > 65535:
        raise ConfigError(
            f"The variable {name}={text!r} cannot be used.", hint="Accepted: a port.", code="bad-variable"
        )
    return int(text)
