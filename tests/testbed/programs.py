"""What `scripts/install-kubernetes.sh` built, and what a computer lacks to run it."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "install-kubernetes.sh"
CNI = Path("/usr/lib/cni")
PYTHON = {"PYTHONPATH": str(REPOSITORY)}
"""Environment of our own programs among the cluster's."""

PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
"""Program → the Debian package that brings it."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """Folders with programs, and what comes with them."""

    etcd: Path
    kubernetes: Path
    knative: Path
    kwok: Path
    coredns: Path


@functools.cache
def find() -> Programs:
    """Raises `FileNotFoundError` with what to do where one is not built."""
    ended = subprocess.run([str(SCRIPT), "--where"], capture_output=True, text=True)
    if ended.returncode:
        raise FileNotFoundError(ended.stderr.strip())
    return Programs(**{name: Path(folder) for name, folder in map(str.split, ended.stdout.splitlines())})


@functools.cache
def why_not() -> str:
    """What is missing to run a cluster here; empty: nothing."""
    if os.getuid() != 0:
        return "a cluster's machines are namespaces, and its pods real containers: both need root"
    missing = {package for program, package in PACKAGES.items() if shutil.which(program) is None}
    if not (CNI / "ptp").exists():
        missing.add("containernetworking-plugins")
    if missing:
        words = " ".join(sorted(missing))
        return f"not installed: {words} (apt-get install --no-install-recommends {words})"
    try:
        find()
    except FileNotFoundError as error:
        return str(error)
    return ""
