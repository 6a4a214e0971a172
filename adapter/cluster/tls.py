"""Serving TLS with a certificate that somebody else renews in mounted files."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

logger = logging.getLogger(__name__)

_LOOK_S = 10.0
"""The kubelet brings a new certificate about a minute after it was written, weeks before the old one ends."""


class ServingTls:
    """`context` is for a server; each handshake takes the certificate that ``tls.crt`` and ``tls.key`` in `folder` last
    were. Until they are there, handshakes fail and `loaded` is false: for a readiness check."""

    def __init__(self, folder: Path) -> None:
        self.context = _context()
        self.context.sni_callback = self._choose
        self._files = folder / "tls.crt", folder / "tls.key"
        self._current: ssl.SSLContext | None = None
        self._read: object = None
        self._why_not = ""

    @property
    def loaded(self) -> bool:
        return self._current is not None

    def look(self) -> bool:
        """Take what is in the files, where it has changed and is whole; true where it was taken.

        A pair that does not match (one file is new, the other not yet) is looked at again the next time.
        """
        try:
            seen = [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in self._files)]
            if seen == self._read:
                return False
            context = _context()
            context.load_cert_chain(*self._files)
        except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
            why = f"{type(exc).__name__}: {exc}"
            if why != self._why_not:
                logger.warning("no new certificate to serve with", extra={"fields": {"why": why}})
            self._why_not = why
            return False
        self._current, self._read, self._why_not = context, seen, ""
        logger.info("serving with a new certificate", extra={"fields": {"file": str(self._files[0])}})
        return True

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    def _choose(
        self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext
    ) -> int | None:
        if self._current is None:
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        connection.context = self._current
        return None


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
