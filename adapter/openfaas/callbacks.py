"""Where answers of asynchronous invocations may be sent.

Whoever may call a function names the address. On a cluster that must not be what only this machine is let in to: its own
ports, and those of its link and others where clouds answer with a machine's credentials.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from dataclasses import dataclass
from errno import EACCES
from ipaddress import IPv6Address, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver
from yarl import URL

from adapter.errors import ConfigError
from adapter.keys import CALLBACK_HEADER

_METADATA = frozenset(map(ip_address, ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200")))
"""Where clouds answer with a machine's credentials and that is no link's address: AWS and Google over IPv6, Alibaba."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """`is_guarded`: not to this machine, and not to its link, but for the names in `hosts`."""

    is_guarded: bool = False
    hosts: Collection[str] = ()

    def check(self, url: str) -> None:
        """Raises `ConfigError` for what is no URL, or has an address in place of a name that may not be called."""
        try:
            parts = URL(url)  # as the client reads it
            host = parts.host if parts.scheme in ("http", "https") else None
        except ValueError:
            host = None
        if not host:
            raise ConfigError(
                f"{CALLBACK_HEADER} {url!r} cannot be called.", hint="Use http://… or https://…", code="bad-callback"
            )
        is_address = ":" in host or host.replace(".", "").isdigit()  # a client resolves no such host
        if is_address and not self.allows(host, host):
            raise ConfigError(
                f"{CALLBACK_HEADER} {url!r} may not be called.",
                why="It is this machine, or its own link.",
                hint="Use a name, or an address, of another; whoever runs the provider can allow one: --callback-hosts",
                code="bad-callback",
            )

    def allows(self, host: str, address: str) -> bool:
        """Whether `host` may be called at `address`."""
        if not self.is_guarded or host in self.hosts:
            return True
        try:
            found = ip_address(address)
        except ValueError:  # 127.1
            return False
        if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        is_here = found.is_loopback or found.is_link_local or found.is_unspecified or found in _METADATA
        return not (is_here or found.is_multicast)


ANYWHERE = Callbacks()


class Resolver(AbstractResolver):
    """Knows only addresses that may be called: what it was asked for is what is connected to."""

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = callbacks
        self._inner = DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        allowed = [each for each in found if self._callbacks.allows(host, each["host"])]
        if not allowed:
            raise PermissionError(EACCES, f"{host} is this machine, or on its own link: callbacks may not go there")
        return allowed

    async def close(self) -> None:
        await self._inner.close()
