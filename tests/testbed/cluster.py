"""A real Kubernetes on this computer: started and stopped, asked and shown."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from adapter.keys import NVIDIA_GPU as GPU
from tests.testbed import control_plane, knative, kwok
from tests.testbed.certificates import Authority
from tests.testbed.images import Image, program_image
from tests.testbed.machines import ENVIRONMENT, Component, Machine, TestbedFailed, run, wait_until
from tests.testbed.nodes import PAUSE_IMAGE, RUNTIME_CLASS, Node, RunningNode
from tests.testbed.programs import PYTHON, find
from tests.testbed.site import Site
from tests.testbed.slots import Addresses, Slot


class Cluster:
    """A control plane; with `nodes`, what runs pods; with `knative`, Knative Serving and an ingress for it.

    Nothing of it is left after `stop`, nor when this process dies before. Raises `TestbedFailed` where it cannot start."""

    def __init__(self, nodes: Sequence[Node] = (), *, knative: bool = False) -> None:
        if knative and not nodes:
            raise ValueError("Knative's own pods need a node")
        self._wanted, self._with_knative = tuple(nodes), knative
        self.components: dict[str, Component] = {}
        """Every program by its name: etcd, kube-apiserver, …, kubelet-NODE; to be killed and started by tests."""
        self.nodes: dict[str, RunningNode] = {}

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Its life.

    def start(self) -> Cluster:
        """Returns when the API server is ready, and nodes and Knative are, where asked for."""
        self._slot = Slot.take()
        self.folder = self._slot.folder
        """Logs, settings, keys; and for each node what it has in /var/lib, /run and /var/log."""
        self.addresses: Addresses = self._slot.addresses
        self._machine: Machine | None = None
        try:
            (self.folder / "logs").mkdir()
            self.site = Site(find(), self.addresses, Authority(self.folder / "certificates"), self.folder)
            self._machine = Machine.first("control plane")
            self._connect(self._machine)
            self._start_control_plane(self._machine)
        except TestbedFailed as error:
            said = self.report()
            self.stop()
            raise TestbedFailed(f"{error}\n{said}") from None
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends everything, and removes every trace."""
        if self._machine is not None:
            self._machine.end()
        _remove_link(self.link)  # the kernel would, a moment later
        for component in self.components.values():
            component.forget()
        for node in self.nodes.values():
            node.machine.end()
        self._slot.release()

    def _connect(self, machine: Machine) -> None:
        """A switch, with cables to the control plane and to this computer."""
        own, link = self.addresses, self.link
        _remove_link(link)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "host", "netns", str(machine.pid))
        machine.script(
            "ip link add switch type bridge",
            "ip link set host master switch up",
            f"ip address add {own.control_plane}/24 dev switch",
            "ip link set switch up",
            f"ip route add default via {own.host}",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
        )
        run("ip", "address", "add", f"{own.host}/24", "dev", link)
        run("ip", "link", "set", link, "up")
        run("ip", "route", "add", own.all_pods, "via", own.control_plane)

    @property
    def link(self) -> str:
        """The cable's end on this computer."""
        return f"gpufn-{self.addresses.number}"

    def _start_control_plane(self, machine: Machine) -> None:
        site = self.site
        etcd = self._component("etcd", machine, control_plane.etcd(site)).start()
        server = self._component("kube-apiserver", machine, control_plane.api_server(site)).start()
        # While it starts: what needs no API server.
        self._boot_nodes(machine)
        wait_until("API server", self.is_ready, 60, [etcd, server])
        self._component("kube-controller-manager", machine, control_plane.controller_manager(site)).start()
        self._component("kube-scheduler", machine, control_plane.scheduler(site)).start()
        for node in self.nodes.values():
            node.join()
        self._wait_for_account("default")  # the controller manager is at work
        if self.nodes:
            self._wait_for_nodes(machine)

    def _wait_for_account(self, namespace: str) -> None:
        """Until pods can be made there: one that names no ServiceAccount is refused while there is no default one."""
        self.kubectl("wait", "serviceaccount/default", "--namespace", namespace, "--for=create", "--timeout=60s")

    def _wait_for_nodes(self, machine: Machine) -> None:
        site = self.site
        self._component("coredns", machine, control_plane.dns(site)).start()
        has_drivers = any(node.node.driver for node in self.nodes.values())
        self.apply([*control_plane.dns_service(site), *([RUNTIME_CLASS] if has_drivers else ())])
        if self._with_knative:
            self._start_knative(machine)
        self.kubectl("wait", "node", *self.nodes, "--for=condition=Ready", "--timeout=100s")
        for node in self._wanted:
            wait_until(f"GPUs of {node.name}", functools.partial(self._has_gpus, node), 60)

    def _has_gpus(self, node: Node) -> bool:
        said: dict[str, str] = self.get("node", node.name)["status"].get("allocatable", {})
        return said.get(GPU, "0") == str(node.gpus)

    def _boot_nodes(self, machine: Machine) -> None:
        for index, node in enumerate(self._wanted):
            cgroup = self._slot.make_cgroup(node.name)
            self.nodes[node.name] = made = RunningNode(self.site, node, index, machine, cgroup, self._component)
            made.containerd.start()
        if self.nodes:
            pause = program_image(PAUSE_IMAGE, self.site.programs.kubernetes / "pause", self.folder)
            self.load(pause, *(knative.images(self.site) if self._with_knative else ()))
            # Services are what nodes make of them: this way lead the control plane and this computer to them.
            own = self.addresses
            machine.script(f"ip route add {own.services} via {own.node(0)}")
            run("ip", "route", "add", own.services, "via", own.control_plane)

    def _start_knative(self, machine: Machine) -> None:
        site = self.site
        self.apply(knative.objects(site))
        words = [sys.executable, "-m", "tests.testbed.ingress", str(site.admin), self.addresses.control_plane]
        words += [knative.ingress_host(), knative.INGRESS_CLASS]
        self._component("ingress", machine, words, PYTHON).start()
        wait = ("wait", "deployment", "--all", "--for=condition=Available", "--timeout=100s")
        self.kubectl("--namespace", knative.NAMESPACE, *wait)

    def is_ready(self) -> bool:
        """The API server's own word."""
        with contextlib.suppress(TestbedFailed):
            return self.kubectl("get", "--raw", "/readyz", "--request-timeout=2s") == "ok"
        return False

    def _component(
        self, name: str, machine: Machine, command: Sequence[str], environment: Mapping[str, str] = {}
    ) -> Component:
        made = Component(name, machine, command, self.folder / "logs" / f"{name}.log", environment)
        self.components[name] = made
        return made

    # Asking it.

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.site.admin

    def kubeconfig_for(self, token: str, path: Path) -> Path:
        """Writes the one of whoever has this token."""
        config = json.loads(self.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token}
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    def kubectl(self, *words: str, stdin: str | bytes = b"", timeout_s: float = 120) -> str:
        """What kubectl printed, as the administrator. Raises `TestbedFailed` with what it said."""
        program = str(self.site.programs.kubernetes / "kubectl")
        given = stdin.encode() if isinstance(stdin, str) else stdin
        environment = {**ENVIRONMENT, "KUBECONFIG": str(self.kubeconfig), "HOME": str(self.folder)}
        return run(program, *words, stdin=given or None, env=environment, timeout_s=timeout_s)

    def apply(self, objects: Sequence[Mapping[str, Any]], *words: str) -> None:
        """Creates or updates them, in their order, by server-side apply. `words` are further options."""
        listing = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", *words, stdin=listing)

    def make_namespace(self, name: str, labels: Mapping[str, str] = {}) -> None:
        """Returns when pods can be made in it."""
        metadata = {"name": name, "labels": dict(labels)}
        self.create("/api/v1/namespaces", [{"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}])
        self._wait_for_account(name)

    def get(self, *words: str) -> dict[str, Any]:
        """Objects as JSON: what `kubectl get … -o json` prints."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *words, "--output=json"))
        return found

    # What runs in it.

    @property
    def ingress_url(self) -> str:
        """Functions of Knative answer there to their host's name (``Host: NAME.NAMESPACE.functions.test``)."""
        return f"http://{self.addresses.control_plane}"

    def load(self, *images: Image) -> None:
        """Gives images to all nodes; pods find them there by name."""
        self._on_all_nodes(lambda node: node.load(*images))

    def load_archive(self, archive: Path) -> None:
        """Gives the images of a docker or OCI archive to all nodes, by the names in it."""
        self._on_all_nodes(lambda node: node.load_archive(archive))

    def _on_all_nodes(self, act: Callable[[RunningNode], None]) -> None:
        with ThreadPoolExecutor() as threads:
            list(threads.map(act, self.nodes.values()))

    def add_kwok_nodes(
        self,
        count: int,
        *,
        gpus: int = 0,
        labels: Mapping[str, str] = {},
        taints: Sequence[Mapping[str, str]] = (),
        cpus: int = 64,
        memory: str = "512Gi",
        prefix: str = "kwok",
    ) -> list[str]:
        """Makes nodes that only seem to be there, PREFIX-0 and so on; returns their names when all are Ready."""
        if "kwok" not in self.components:
            assert self._machine is not None
            self._component("kwok", self._machine, kwok.command(self.site)).start()
        names = [f"{prefix}-{index}" for index in range(count)]
        made = [kwok.node(name, gpus, labels, taints, cpus, memory) for name in names]
        self.create("/api/v1/nodes", made)
        wanted = set(names)
        wait_until("KWOK's nodes", lambda: wanted <= self._ready_nodes(), 60 + count / 10, [self.components["kwok"]])
        return names

    def _ready_nodes(self) -> set[str]:
        rows = (line.split() for line in self.kubectl("get", "nodes", "--no-headers").splitlines())
        return {row[0] for row in rows if row[1].split(",")[0] == "Ready"}

    def create(self, path: str, objects: Sequence[Mapping[str, Any]]) -> None:
        """Posts many objects, faster than kubectl does."""
        with self.session() as session:
            for item in objects:
                answer = session.post(f"{self.site.server}{path}", json=item)
                if not answer.ok:
                    raise TestbedFailed(f"{path}: {answer.text}")

    def session(self) -> requests.Session:
        """The administrator's, for requests to `site.server`."""
        session = requests.Session()
        session.trust_env = False
        session.verify = str(self.site.authority.certificate)
        folder = self.site.authority.folder
        session.cert = (str(folder / "kubeconfig.crt"), str(folder / "kubeconfig.key"))
        return session

    def report(self) -> str:
        """What it looks like, and the end of what every program said: for a test that failed."""
        parts = [
            f"--- {name}{'' if component.is_running else ' (ended)'}\n{component.tail()}"
            for name, component in self.components.items()
        ]
        for words in (("get", "pods", "-A", "-o", "wide"), ("events", "-A", "--types=Warning")):
            with contextlib.suppress(TestbedFailed):
                parts.append(f"--- kubectl {' '.join(words)}\n{self.kubectl(*words)[-4000:]}")
        return "\n".join(parts)


def _remove_link(name: str) -> None:
    with contextlib.suppress(TestbedFailed):  # there is none
        run("ip", "link", "delete", name)
