"""Image references as Docker reads them: ``[host[:port]/]repository[:tag][@digest]``."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from ipaddress import ip_address

from adapter.errors import ConfigError

DOCKER_HUB = "docker.io"
_DOCKER_HUB_API = "registry-1.docker.io"
_LENGTH_LIMIT = 1024
_HOST = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]{0,252}[a-zA-Z0-9])?|\[[0-9a-fA-F:.]{2,45}\])(?::[0-9]{1,5})?"
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_HOST_TEXT = re.compile(_HOST)
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def local_architecture() -> str:
    """What this machine's processor is called in registries."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def is_digest(text: object) -> bool:
    """Whether it is a SHA-256 digest, the only kind that is used here."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Reference:
    """One image. `tag` is ``latest`` where neither tag nor digest was written, else empty where none was."""

    host: str
    repository: str
    tag: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises `ConfigError` (``bad-reference``) with the part that cannot be read."""
        rest, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise _bad(text, f"{digest[:80]!r} is no digest: sha256: and 64 hexadecimal digits.")
        first, slash, behind = rest.partition("/")
        has_host = bool(slash) and ("." in first or ":" in first or first == "localhost")
        host, rest = (first, behind) if has_host else (DOCKER_HUB, rest)
        if not _HOST_TEXT.fullmatch(host):
            raise _bad(text, f"{host[:80]!r} is no host.")
        repository, colon, tag = rest.partition(":")
        if colon and not _TAG.fullmatch(tag):
            raise _bad(text, f"{tag[:80]!r} is no tag.")
        if len(text) > _LENGTH_LIMIT or not _REPOSITORY.fullmatch(repository):
            raise _bad(text, f"{repository[:80]!r} is no repository: lower-case words, digits, and . _ - between them.")
        if host == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        return cls(host, repository, tag or ("" if digest else "latest"), digest)

    @property
    def wanted(self) -> str:
        """What to ask the registry for: the digest where there is one, else the tag."""
        return self.digest or self.tag

    @property
    def api_host(self) -> str:
        """Host and port that serve the protocol."""
        return _DOCKER_HUB_API if self.host == DOCKER_HUB else self.host

    @property
    def is_local(self) -> bool:
        """Whether the registry is on this machine, where plain HTTP is as good as any."""
        name = self.host.rsplit(":", 1)[0] if not self.host.endswith("]") else self.host
        name = name.strip("[]")
        try:
            return name == "localhost" or ip_address(name).is_loopback
        except ValueError:
            return False

    def at(self, digest: str) -> Reference:
        """The same repository at a digest."""
        return Reference(self.host, self.repository, "", digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


def _bad(text: str, why: str) -> ConfigError:
    shown = text if len(text) <= 100 else text[:97] + "…"
    return ConfigError(
        f"{shown!r} is no image reference.",
        why=why,
        hint="Write it as docker does: registry.example.com/team/name:tag, or …/name@sha256:…",
        code="bad-reference",
    )
