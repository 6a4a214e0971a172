"""Process 1 of a fresh pid namespace: restores a CRIU image there, and resumes it through a helper outside.

Prints the answers, one JSON line each, and keeps the process until its own input ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from adapter.gpu.client import HelperClient
from adapter.gpu.wire import Operation
from adapter.snapshot.process import restore_command, restore_environment


def main() -> None:
    wanted = json.loads(sys.argv[1])
    images, pipes, memory = Path(wanted["images"]), wanted["descriptors"], wanted["memory"]
    command = restore_command(wanted["criu"], images, wanted["pipes"], pipes, memory, log=Path(wanted["log"]))
    inherited = (*pipes, *([memory] if memory >= 0 else []))
    subprocess.run(command, check=True, pass_fds=inherited, env=restore_environment(os.environ, images))
    for descriptor in inherited:
        os.close(descriptor)
    pidfd = os.pidfd_open(wanted["pid"])
    with HelperClient.connect(wanted["helper"]) as client:
        for operation in (Operation.STATE, Operation.RESUME, Operation.PARK, Operation.RESUME):
            print(client.ask(operation, pidfd).to_message().decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
