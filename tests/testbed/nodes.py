"""A node that runs pods for real: containerd, kubelet, kube-proxy, and a device plugin for GPUs that are pretended.

Everything is where it is on a node of anybody's cluster (/var/lib/kubelet, /run/containerd, …), and different on each.
"""

from __future__ import annotations

import dataclasses
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.stubs import build as stubs
from tests.stubs.simulated import Simulated, StubGpu
from tests.testbed import device_plugin, nvidia_runtime
from tests.testbed.images import Image, write_archive
from tests.testbed.machines import Component, Machine, run, wait_until
from tests.testbed.programs import CNI, PYTHON
from tests.testbed.site import DNS_SERVICE, DOMAIN, Site, flags

PAUSE_IMAGE = "gpufn.test/pause:1"
PODS_PER_NODE = 110

RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "nvidia"},
    "handler": "nvidia",
}
DRIVER = Path("/var/lib/nvidia-driver")

KERNEL_SETTINGS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}
"""What a kubelet wants of a kernel, which is not ours alone: it reads that all is well, and changes nothing."""


@dataclasses.dataclass(frozen=True)
class Node:
    """What a node shall be. `gpus` are pretended ones, which its device plugin offers as ``nvidia.com/gpu``.

    With a `driver` containers that see GPUs get the simulated one of tests/stubs, as from NVIDIA's container runtime; it
    shows the GPUs that the labels tell of."""

    name: str
    gpus: int = 0
    driver: bool = False
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    taints: Sequence[str] = ()
    """``key=value:effect``."""


def gpu_labels(product: str = "NVIDIA-L4", memory_mib: int = 23034, count: int = 1, **more: str) -> dict[str, str]:
    """What GPU Feature Discovery writes on a node; `more` are others, after ``nvidia.com/``, with `_` for `.`."""
    labels = {
        "gpu.present": "true",
        "gpu.product": product,
        "gpu.memory": str(memory_mib),
        "gpu.count": str(count),
        "gpu.replicas": "1",
        "gpu.sharing-strategy": "none",
        "gpu.family": "ada-lovelace",
        "gpu.compute.major": "8",
        "gpu.compute.minor": "9",
        "gpu.machine": "testbed",
        "mig.capable": "false",
        "mig.strategy": "single",
        "cuda.driver-version.full": "580.95.05",
        "cuda.driver-version.major": "580",
        "cuda.driver-version.minor": "95",
        "cuda.driver-version.revision": "05",
        "cuda.runtime-version.full": "13.0",
        "cuda.runtime-version.major": "13",
        "cuda.runtime-version.minor": "0",
    }
    labels |= {name.replace("_", "."): value for name, value in more.items()}
    return {f"nvidia.com/{name}": value for name, value in labels.items()}


def gpu_ids(node: str, count: int) -> list[str]:
    """Of pretended GPUs: the same at each start, different on each node."""
    return [f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{index}.{node}')}" for index in range(count)]


def two_nodes() -> tuple[Node, Node]:
    """What tests and `make cluster-up` have, with a driver where it can be built."""
    has_driver = not stubs.why_not()
    ampere = gpu_labels("NVIDIA-A100-SXM4-40GB", 40960, gpu_family="ampere", gpu_compute_minor="0")
    return (
        Node("node1", gpus=2, driver=has_driver, labels=gpu_labels(count=2)),
        Node("node2", gpus=1, driver=has_driver, labels=ampere),
    )


class RunningNode:
    """A node whose programs run. `folder` on this computer has what the node has in /var/lib, /run and /var/log."""

    def __init__(
        self,
        site: Site,
        node: Node,
        index: int,
        control_plane: Machine,
        cgroup: str,
        component: Callable[..., Component],
    ) -> None:
        self.node, self.name = node, node.name
        self.address, self.pods = site.addresses.node(index), site.addresses.pods(index)
        self.folder = site.folder / node.name
        self._bases: set[str] = set()
        self.machine = self._make_machine(site, control_plane)
        self.driver = self._install_driver() if node.driver else None
        """The simulated machine that its GPUs are of: to lose them, or to script faults."""
        self._connect(site, control_plane)
        containerd = ["containerd", "--config", str(self._containerd_settings())]
        plugin = [sys.executable, "-m", "tests.testbed.device_plugin", *gpu_ids(self.name, node.gpus)]
        self.containerd = component(f"containerd-{self.name}", self.machine, containerd)
        self.kubelet = component(f"kubelet-{self.name}", self.machine, self._kubelet(site, cgroup))
        self.proxy = component(f"kube-proxy-{self.name}", self.machine, self._proxy(site))
        self.device_plugin = component(f"device-plugin-{self.name}", self.machine, plugin, PYTHON)

    @property
    def container_socket(self) -> Path:
        """Of containerd, as this computer reaches it."""
        return self.folder / "run" / "containerd" / "containerd.sock"

    def join(self) -> None:
        """Starts what makes it a node of the cluster, whose API server must answer."""
        self.kubelet.start()
        self.proxy.start()
        if self.node.gpus:
            self.device_plugin.start()

    def load(self, *images: Image) -> None:
        """Gives it images."""
        archive = write_archive(images, self.folder / "images.tar", without=self._bases)
        self.load_archive(archive)
        archive.unlink()
        self._bases |= {digest for image in images for digest in image.base_digests}

    def load_archive(self, archive: Path) -> None:
        """Gives it the images of a docker or OCI archive. Waits for containerd."""
        wait_until(f"containerd on {self.name}", self.container_socket.exists, 30, [self.containerd])
        import_archive(self.container_socket, archive)

    def _make_machine(self, site: Site, control_plane: Machine) -> Machine:
        mounts: dict[Path, str] = {}
        for name in ("var/lib", "var/log", "run"):
            outside = self.folder / name.replace("/", "-")
            outside.mkdir(parents=True)
            mounts[outside] = f"/{name}"
        for name, value in KERNEL_SETTINGS.items():
            if Path("/proc/sys", name).exists():
                mounts[site.write(f"{self.name}/sys/{name}", f"{value}\n")] = f"/proc/sys/{name}"
        # No names but the cluster's: an image that is not here is missed at once.
        mounts[site.write(f"{self.name}/resolv.conf", "")] = "/etc/resolv.conf"
        return control_plane.another(self.name, mounts)

    def break_gpus(self, *gpus: str) -> None:
        """Its device plugin says of these, and of no others, that they are out of order."""
        (self.folder / "var-lib" / device_plugin.UNHEALTHY.relative_to("/var/lib")).write_text("\n".join(gpus))

    def _install_driver(self) -> Simulated:
        place = self.folder / "var-lib" / DRIVER.relative_to("/var/lib")
        driver = Simulated(place, libraries=place)
        stubs.build(place)
        labels = self.node.labels
        model = labels.get("nvidia.com/gpu.product", "Simulated-GPU").replace("-", " ")
        memory = int(labels.get("nvidia.com/gpu.memory", "8192")) << 20
        driver.set(*(StubGpu(gpu, memory, name=model) for gpu in gpu_ids(self.name, self.node.gpus)))
        runtime = self.folder / "nvidia-container-runtime"
        runtime.write_text(nvidia_runtime.wrapper(sys.executable, str(DRIVER)))
        runtime.chmod(0o755)
        return driver

    def _connect(self, site: Site, control_plane: Machine) -> None:
        """A cable to the cluster's switch, and routes: to this node's pods, and to all else by way of this computer."""
        control_plane.script(
            f"ip link add {self.name} type veth peer name eth0 netns {_pid_inside(self.machine)}",
            f"ip link set {self.name} master switch up",
            f"ip route add {self.pods} via {self.address}",
        )
        self.machine.script(
            f"ip address add {self.address}/24 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {site.addresses.control_plane}",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
        )
        site.write(f"{self.name}/cni/10-ptp.conflist", self._network())

    def _network(self) -> dict[str, object]:
        """Pods are routed, not bridged: what they send always passes the rules that kube-proxy makes."""
        addresses = {"type": "host-local", "ranges": [[{"subnet": self.pods}]], "routes": [{"dst": "0.0.0.0/0"}]}
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": addresses}]}

    def _containerd_settings(self) -> Path:
        runtime, program = ("nvidia", self.folder / "nvidia-container-runtime") if self.driver else ("runc", "runc")
        path = self.folder / "containerd.toml"
        path.write_text(f"""version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "{runtime}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{runtime}]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{runtime}.options]
        BinaryName = "{program}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{self.folder}/cni"
""")
        return path

    def _kubelet(self, site: Site, cgroup: str) -> list[str]:
        user = f"system:node:{self.name}"
        certificate, key = site.authority.issue(
            f"kubelet-{self.name}", user, ["system:nodes"], [self.name, self.address]
        )
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(site.authority.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": cgroup,
            "clusterDNS": [site.addresses.service(DNS_SERVICE)],
            "clusterDomain": DOMAIN,
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "enforceNodeAllocatable": [],
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "failCgroupV1": False,
            "failSwapOn": False,
            "imageGCHighThresholdPercent": 100,  # the disk is not ours alone
            "localStorageCapacityIsolation": True,
            "makeIPTablesUtilChains": False,
            "maxPods": PODS_PER_NODE,
            "oomScoreAdj": 0,
            "registerWithTaints": [_taint(text) for text in self.node.taints],
            "resolvConf": "",
            "syncFrequency": "10s",
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
        }
        words = [
            str(site.programs.kubernetes / "kubelet"),
            *flags(
                config=site.write(f"{self.name}/kubelet.json", settings),
                kubeconfig=site.kubeconfig(user, "system:nodes"),
                hostname_override=self.name,
                node_ip=self.address,
            ),
        ]
        if self.node.labels:
            words += flags(node_labels=",".join(f"{name}={value}" for name, value in self.node.labels.items()))
        return words

    def _proxy(self, site: Site) -> list[str]:
        settings = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": site.addresses.all_pods,
            "clientConnection": {"kubeconfig": str(site.kubeconfig("system:kube-proxy"))},
            # Of the whole computer's kernel: not ours to change.
            "conntrack": {"maxPerCore": 0, "min": 0},
        }
        path = site.write(f"{self.name}/kube-proxy.json", settings)
        return [str(site.programs.kubernetes / "kube-proxy"), *flags(config=path, hostname_override=self.name)]


def import_archive(socket: Path, archive: Path) -> None:
    """Gives the images of an archive to the containerd of this socket."""
    run("ctr", "--address", str(socket), "--namespace", "k8s.io", "images", "import", str(archive), timeout_s=600)


def _taint(text: str) -> dict[str, str]:
    setting, effect = text.rsplit(":", 1)
    key, _, value = setting.partition("=")
    return {"key": key, "value": value, "effect": effect}


def _pid_inside(machine: Machine) -> int:
    """Of a machine's holder, as the cluster counts."""
    for line in Path(f"/proc/{machine.pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    raise AssertionError("unreachable")
