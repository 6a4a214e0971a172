"""What every part of a cluster is set up from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.testbed.certificates import Authority
from tests.testbed.programs import Programs
from tests.testbed.slots import Addresses

DOMAIN = "cluster.local"
DNS_SERVICE = 10
"""Of the addresses for services, the one that pods ask for names."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One cluster's programs, addresses, authority and state folder."""

    programs: Programs
    addresses: Addresses
    authority: Authority
    folder: Path

    @property
    def server(self) -> str:
        return f"https://{self.addresses.control_plane}:6443"

    def kubeconfig(self, user: str, *groups: str) -> Path:
        """The file of a client, made when it is first asked for."""
        path = self.folder / f"{user.replace(':', '-')}.kubeconfig"
        return path if path.exists() else self.authority.kubeconfig(path, self.server, user, groups)

    @property
    def admin(self) -> Path:
        path = self.folder / "kubeconfig"
        return path if path.exists() else self.authority.kubeconfig(path, self.server, "admin", ["system:masters"])

    def write(self, name: str, content: str | Mapping[str, Any]) -> Path:
        """A file in the state folder; a mapping becomes JSON, which every YAML reader reads."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        return path


def flags(**values: str | Path | bool | int) -> list[str]:
    """``--some-name=value`` for each ``some_name``."""
    words = []
    for name, value in values.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words.append(f"--{name.replace('_', '-')}={text}")
    return words
