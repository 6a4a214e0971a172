"""Records what kn says and hears, for every step of the scenario, as `conversations/<number>-<step>.json`.

    KN=/path/to/kn python -m tests.contract.knative.record

A small proxy between the real kn and the API server of a testbed's cluster (tests/testbed/README.md), with Knative and
gpufn on it, keeps each request and answer as `conversation.py` says. kn is given no credentials: the proxy has them.
`tests/cluster/test_kn_conversations.py` says it all again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.contract.knative import conversation
from tests.contract.knative.scenario import STEPS, Step
from tests.testbed import functions
from tests.testbed.cluster import Cluster
from tests.testbed.installation import installed
from tests.testbed.nodes import two_nodes
from tests.testbed.programs import REPOSITORY

FOLDER = Path(__file__).parent / "conversations"
KEPT_REQUEST_HEADERS = ("Accept", "Content-Type", "User-Agent")
STEP_S = 180


class Proxy(BaseHTTPRequestHandler):
    """Of one request; what was said goes to `exchanges`."""

    cluster: Cluster
    exchanges: list[dict[str, Any]]

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        exchange = {"request": conversation.request(self.command, self.path, self.headers["Content-Type"], body)}
        self.exchanges.append(exchange)
        headers = {name: self.headers[name] for name in KEPT_REQUEST_HEADERS if name in self.headers}
        url, watch = f"{self.cluster.site.server}{self.path}", conversation.is_watch(self.path)
        with self.cluster.session() as session:
            session.headers["Accept-Encoding"] = "identity"
            answer = session.request(self.command, url, data=body, headers=headers, stream=watch)
            content = b"" if watch else answer.content
            exchange["answer"] = conversation.answer(answer.status_code, answer.headers, content)
            self.send_response(answer.status_code)
            for name in ("Content-Type", "Warning"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()  # HTTP/1.0: the answer's end is the connection's
            with contextlib.suppress(OSError):  # kn has seen enough, or the cluster has ended
                for part in answer.iter_content(None):
                    self.wfile.write(part)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward  # noqa: N815 - names of http.server

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def recording(cluster: Cluster) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The proxy's address, and what has been said by it."""
    exchanges: list[dict[str, Any]] = []
    own = type("Recorder", (Proxy,), {"cluster": cluster, "exchanges": exchanges})
    with ThreadingHTTPServer(("127.0.0.1", 0), own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", exchanges
        server.shutdown()


def run(binary: str, step: Step, home: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": str(home / "kubeconfig")}
    done = subprocess.run(
        [binary, *step.arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STEP_S,
        check=False,
    )
    missing = [words for words in step.says if words not in done.stdout]
    if done.returncode != step.code or missing:
        sys.exit(f"kn {' '.join(step.arguments)}: exit {done.returncode}, does not say {missing}\n{done.stdout}")


def kubeconfig(url: str) -> dict[str, Any]:
    context = {"cluster": "proxy", "user": "nobody", "namespace": conversation.NAMESPACE}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "proxy",
        "clusters": [{"name": "proxy", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "proxy", "context": context}],
    }


def record(binary: str, cluster: Cluster) -> None:
    for old in FOLDER.glob("*.json"):
        old.unlink()
    cluster.kubectl("create", "namespace", conversation.NAMESPACE)
    with tempfile.TemporaryDirectory() as home, recording(cluster) as (url, exchanges):
        (Path(home) / "kubeconfig").write_text(json.dumps(kubeconfig(url)))
        for number, step in enumerate(STEPS, 1):
            run(binary, step, Path(home))
            data = {"command": ["kn", *step.arguments], "exchanges": exchanges}
            path = FOLDER / f"{number:02d}-{step.name}.json"
            path.write_text(json.dumps(data, indent=2) + "\n")
            exchanges.clear()


def main(binary: str) -> None:
    with Cluster(two_nodes(), knative=True) as cluster, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout = functions.base_layout(folder / "base")
        cluster.load(functions.function_image("dev.local/echo:1", REPOSITORY / "functions" / "echo", layout, folder))
        with installed(cluster, "knative"):
            record(binary, cluster)


if __name__ == "__main__":
    found = os.environ.get("KN") or shutil.which("kn")
    if found is None:
        sys.exit("no kn on the PATH; name it in KN")
    main(found)
