"""Stands in for uv: `uv venv … HOME` makes a folder, `uv pip install` installs nothing; both are written down.

FAKE_UV_LOG names the file of calls. With FAKE_UV_GATE, a named pipe, an install waits until it is written to.
"""

import os
import sys

arguments = sys.argv[1:]
with open(os.environ["FAKE_UV_LOG"], "a") as log:
    log.write(f"{os.getpid()} {' '.join(arguments)}\n")
if arguments[0] == "venv":
    os.makedirs(os.path.join(arguments[-1], "bin"))
    os.symlink(sys.executable, os.path.join(arguments[-1], "bin", "python"))
elif os.environ.get("FAKE_UV_GATE"):
    with open(os.environ["FAKE_UV_GATE"]) as gate:
        gate.read()
if os.environ.get("FAKE_UV_ERROR"):
    sys.exit(os.environ["FAKE_UV_ERROR"])
