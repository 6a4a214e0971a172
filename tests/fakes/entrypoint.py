"""An entrypoint that speaks the protocol of a standby shell and does as the variable FAKE says.

"" serves; "garbage" says things that are no events first; "twice" says STOPPED twice; "dies" ends with
code 7 once it has its orders; "deaf" hears nothing, not even its host's end; "stray" leaves a process of
another session behind; "chatty" prints; "floods" does so without end; "hangs" never comes up. On RESUME it
serves again, and says on which devices.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time

from adapter.records import Event, EventName
from adapter.replica import STANDBY_VARIABLE, Command

SHOWN = (
    "GPUFN_FUNCTION", "GPUFN_SECRETS_DIR", "WHO", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "GPUFN_DEVICE", "GPUFN_RESUME"
)  # fmt: skip


def main():
    line_fd, events_fd = map(int, os.environ[STANDBY_VARIABLE].split())
    line = socket.socket(fileno=line_fd)
    data, descriptors, _, _ = socket.recv_fds(line, 2**20, 1)
    if not data:
        return 0
    environ = json.loads(data)
    behaviour = environ.get("FAKE", "")
    listener = socket.socket(fileno=descriptors[0])

    def say(name, **fields):
        os.write(events_fd, Event(name, time.time_ns(), fields).to_line())

    if behaviour == "garbage":
        os.write(events_fd, b'not json\n{"event": "nonsense", "at_ns": 1}\n[]\n\n')
    if behaviour == "dies":
        return 7
    if behaviour == "stray":
        stray = subprocess.Popen(["sleep", "300"], start_new_session=True)
        say(EventName.SNAPSHOT, state="skipped", reason=str(stray.pid))
    if behaviour == "chatty":
        print("one\ntwo", flush=True)
        print("three, without an end", end="", file=sys.stderr, flush=True)
    if behaviour == "floods":
        threading.Thread(target=flood, daemon=True).start()
    if behaviour == "hangs":
        line.recv(1)
    say(EventName.LISTENING, port=listener.getsockname()[1])
    threading.Thread(target=serve, args=(listener, environ), daemon=True).start()
    say(EventName.SERVING, rung="load")
    while behaviour == "deaf":
        time.sleep(60)
    while True:
        words = line.recv(4096)
        if not words or Command.STOP in words:
            break
        if Command.PARK in words:
            say(EventName.PARKED)
        if words.startswith(Command.RESUME):
            say(EventName.SERVING, rung="resume", devices=Command.devices_in(words))
    for _ in range(2 if behaviour == "twice" else 1):
        say(EventName.STOPPED)
    return 0


def flood():
    while True:
        os.write(1, b"\n" * 65536)


def serve(listener, environ):
    shown = {name: environ.get(name) for name in SHOWN}
    body = json.dumps(shown).encode()
    while True:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
