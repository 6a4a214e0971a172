"""The agent's settings, from its environment. Paths are the node's as the agent sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapter.agent import kubelet, pod_log
from adapter.errors import ConfigError
from adapter.keys import ENV_CRIU, NODE_CRIU_PATH, SNAPSHOT_PATH
from adapter.ledger import connection
from adapter.units import parse_size_bytes


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """`ledger_dir` has ``token`` and ``ca.crt``. `snapshot_limit_bytes`: what all snapshots of the node may take."""

    node: str
    ledger_url: str
    ledger_dir: Path
    state_dir: Path
    snapshot_dir: Path
    snapshot_limit_bytes: int
    criu: str
    lent_criu_dir: Path
    seccomp_dir: Path
    kubelet_socket: Path
    pod_logs_dir: Path
    status_port: int

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> AgentSettings:
        """Raises `ConfigError`."""
        node = environ.get("GPUFN_NODE", "")
        if not node:
            raise ConfigError(
                "The agent does not know its node.",
                why="GPUFN_NODE is not set.",
                hint="Set it from the field spec.nodeName, as manifests/base/agent.yaml does.",
                code="no-node",
            )

        def path(name: str, default: str | Path) -> Path:
            return Path(environ.get(name) or default)

        return cls(
            node=node,
            ledger_url=environ.get("GPUFN_LEDGER_ADDRESS") or connection.ADDRESS,
            ledger_dir=path("GPUFN_LEDGER_DIR", connection.FOLDER),
            state_dir=path("GPUFN_STATE_DIR", "/var/lib/gpufn/agent"),
            snapshot_dir=path("GPUFN_SNAPSHOT_DIR", SNAPSHOT_PATH),
            snapshot_limit_bytes=_read(environ, "GPUFN_SNAPSHOT_LIMIT", "100Gi", "a size like 100Gi", parse_size_bytes),
            criu=environ.get(ENV_CRIU, ""),
            lent_criu_dir=path("GPUFN_LENT_CRIU_DIR", NODE_CRIU_PATH),
            seccomp_dir=path("GPUFN_SECCOMP_DIR", "/var/lib/kubelet/seccomp"),
            kubelet_socket=path("GPUFN_KUBELET_SOCKET", kubelet.SOCKET),
            pod_logs_dir=path("GPUFN_POD_LOGS_DIR", pod_log.FOLDER),
            status_port=_read(environ, "GPUFN_STATUS_PORT", "8080", "a port", int),
        )


def _read(environ: Mapping[str, str], name: str, default: str, accepted: str, parse: Callable[[str], int]) -> int:
    text = environ.get(name) or default
    try:
        return parse(text)
    except ValueError as exc:
        raise ConfigError(
            f"The variable {name}={text!r} cannot be used.", hint=f"Accepted: {accepted}.", code="bad-variable"
        ) from exc
