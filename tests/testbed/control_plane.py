"""The control plane's programs and their settings: etcd, API server, controller manager, scheduler, and CoreDNS."""

from __future__ import annotations

from typing import Any

from tests.testbed.site import DNS_SERVICE, DOMAIN, Site, flags

ISSUER = f"https://kubernetes.default.svc.{DOMAIN}"
ETCD = "http://127.0.0.1:2379"  # nobody else is on that machine


def etcd(site: Site) -> list[str]:
    return [
        str(site.programs.etcd / "etcd"),
        *flags(
            data_dir=site.folder / "etcd",
            listen_client_urls=ETCD,
            advertise_client_urls=ETCD,
            listen_peer_urls="http://127.0.0.1:2380",
            unsafe_no_fsync=True,  # no cluster here outlives its machine
        ),
    ]


def api_server(site: Site) -> list[str]:
    addresses, authority = site.addresses, site.authority
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{DOMAIN}"]
    own = [addresses.control_plane, addresses.service(1), "127.0.0.1"]
    certificate, key = authority.issue("apiserver", "kube-apiserver", hosts=[*names, "localhost", *own])
    kubelet_certificate, kubelet_key = authority.issue("apiserver-kubelet", "apiserver", groups=["system:masters"])
    public, private = authority.key_pair("service-accounts")
    return [
        str(site.programs.kubernetes / "kube-apiserver"),
        *flags(
            etcd_servers=ETCD,
            advertise_address=addresses.control_plane,
            service_cluster_ip_range=addresses.services,
            allow_privileged=True,
            authorization_mode="Node,RBAC",
            enable_admission_plugins="NodeRestriction",
            client_ca_file=authority.certificate,
            tls_cert_file=certificate,
            tls_private_key_file=key,
            kubelet_certificate_authority=authority.certificate,
            kubelet_client_certificate=kubelet_certificate,
            kubelet_client_key=kubelet_key,
            kubelet_preferred_address_types="InternalIP",
            service_account_issuer=ISSUER,
            service_account_key_file=public,
            service_account_signing_key_file=private,
            shutdown_delay_duration="0s",
        ),
    ]


def controller_manager(site: Site) -> list[str]:
    kubeconfig, authority = site.kubeconfig("system:kube-controller-manager"), site.authority
    return [
        str(site.programs.kubernetes / "kube-controller-manager"),
        *flags(
            kubeconfig=kubeconfig,
            leader_elect=False,
            use_service_account_credentials=True,  # each controller with its own rights, as anywhere
            root_ca_file=authority.certificate,
            service_account_private_key_file=authority.folder / "service-accounts.key",
            cluster_signing_cert_file=authority.certificate,
            cluster_signing_key_file=authority.key,
        ),
    ]


def scheduler(site: Site) -> list[str]:
    return [
        str(site.programs.kubernetes / "kube-scheduler"),
        *flags(kubeconfig=site.kubeconfig("system:kube-scheduler"), leader_elect=False),
    ]


def dns(site: Site) -> list[str]:
    zone = f"{DOMAIN}:53 {{\n  errors\n  kubernetes {DOMAIN} {{\n    kubeconfig {site.admin}\n  }}\n}}\n"
    return [str(site.programs.coredns / "coredns"), "-conf", str(site.write("Corefile", zone))]


def dns_service(site: Site) -> list[dict[str, Any]]:
    """The objects that make CoreDNS, which is no pod, the service that pods ask."""
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    return outside_service(
        "kube-system", "kube-dns", site.addresses.control_plane, ports, cluster_ip=site.addresses.service(DNS_SERVICE)
    )


def outside_service(
    namespace: str, name: str, address: str, ports: list[dict[str, Any]], *, cluster_ip: str = ""
) -> list[dict[str, Any]]:
    """A Service, and the EndpointSlice that leads it to an address that is no pod's."""
    metadata = {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": name}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"ports": ports, **({"clusterIP": cluster_ip} if cluster_ip else {})},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata,
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
            "ports": [{key: value for key, value in port.items() if key != "targetPort"} for port in ports],
        },
    ]
