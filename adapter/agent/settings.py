"""The agent's settings. Paths are the node's as the agent sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapter.agent import kubelet, pod_log
from adapter.keys import ENV_CRIU, NODE_CRIU_PATH, SNAPSHOT_PATH
from adapter.ledger import connection
from adapter.settings import as_path, as_port, as_text, required, variable
from adapter.units import parse_size_bytes


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """See `adapter.settings`."""

    node: str = required(
        "GPUFN_NODE", as_text, "its node: the field spec.nodeName, as manifests/base/agent.yaml has it"
    )
    ledger_url: str = variable("GPUFN_LEDGER_ADDRESS", as_text, connection.ADDRESS, "where the ledger is")
    ledger_dir: Path = variable("GPUFN_LEDGER_DIR", as_path, connection.FOLDER, "folder with token and ca.crt for it")
    state_dir: Path = variable("GPUFN_STATE_DIR", as_path, Path("/var/lib/gpufn/agent"), "what must outlive the agent")
    snapshot_dir: Path = variable("GPUFN_SNAPSHOT_DIR", as_path, Path(SNAPSHOT_PATH), "snapshots of all functions")
    snapshot_limit_bytes: int = variable(
        "GPUFN_SNAPSHOT_LIMIT", parse_size_bytes, 100 * 2**30, "what all snapshots of its node may take"
    )
    criu: str = variable(ENV_CRIU, str, "", "a CRIU to lend to functions; empty: the one that comes with gpufn, if any")
    lent_criu_dir: Path = variable("GPUFN_LENT_CRIU_DIR", as_path, Path(NODE_CRIU_PATH), "where functions find it")
    seccomp_dir: Path = variable(
        "GPUFN_SECCOMP_DIR", as_path, Path("/var/lib/kubelet/seccomp"), "the kubelet's profiles"
    )
    kubelet_socket: Path = variable("GPUFN_KUBELET_SOCKET", as_path, kubelet.SOCKET, "its pod-resources API")
    pod_logs_dir: Path = variable("GPUFN_POD_LOGS_DIR", as_path, pod_log.FOLDER, "logs of the node's containers")
    status_port: int = variable("GPUFN_STATUS_PORT", as_port, 8080, "port of metrics and probes")
