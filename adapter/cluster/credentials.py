"""How to reach a cluster and who to be there: kubeconfig files, exec plugins, a pod's own service account.

The `kubernetes` package reads all of these; nothing else of it is used. What it gives is asked for again once a minute, as
tokens in files are rotated, and whenever the API server refuses it.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter.errors import ConfigError

_FRESH_S = 60.0
"""How long headers are used before they are asked for again; the kubelet rotates tokens long before they end."""
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True)
class Access:
    """One way to an API server. `tls` is None where it is plain HTTP; `headers` are secret."""

    url: str
    namespace: str
    tls: ssl.SSLContext | None = None
    server_name: str | None = None
    proxy: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Credentials:
    """What a kubeconfig's context says, or a pod's service account where `context` and `kubeconfig` are None, no
    KUBECONFIG is set, no ``~/.kube/config`` is there and this is a pod: the order that kubectl has."""

    def __init__(
        self,
        kubeconfig: Path | None = None,
        context: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._files = _kubeconfig_files(kubeconfig, environ)
        self._context, self._environ = context, environ
        self._in_cluster = not (
            kubeconfig or context or environ.get("KUBECONFIG") or any(map(Path.exists, self._files))
        )
        self._configuration: Any = None
        self._access: Access | None = None
        self._asked_at = 0.0
        self._lock = asyncio.Lock()

    async def access(self, *, refused: Access | None = None) -> Access:
        """What to use now. `refused`: the API server did not take that one, or its own certificate was not known.

        Reads files and may run a plugin, in a thread. Raises `ConfigError`.
        """
        access = self._access
        if access is not None and access is not refused and self._is_fresh():
            return access
        async with self._lock:
            access = self._access
            if access is None or access is refused:
                access = await asyncio.to_thread(self._load)
            elif not self._is_fresh():
                access = await asyncio.to_thread(self._renewed, access)
            else:
                return access  # somebody else asked meanwhile
            self._access, self._asked_at = access, time.monotonic()
            return access

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._asked_at < _FRESH_S

    def _load(self) -> Access:
        from kubernetes.client import Configuration  # 0.7 s and 30 MB: only for who talks to a cluster

        configuration = Configuration()
        configuration.ssl_ca_cert = None
        try:
            namespace = self._load_pod(configuration) if self._in_cluster else self._load_files(configuration)
            headers = _headers(configuration)
        except Exception as exc:  # whatever a file that is none does to the package
            raise self._unusable(exc) from None
        self._configuration = configuration
        return Access(
            configuration.host,
            namespace,
            _tls(configuration) if configuration.host.startswith("https:") else None,
            configuration.tls_server_name or None,
            configuration.proxy or None,
            headers,
        )

    def _load_pod(self, configuration: Any) -> str:
        from kubernetes.config import load_incluster_config

        load_incluster_config(client_configuration=configuration)
        return _POD_NAMESPACE.read_text().strip() or "default"

    def _load_files(self, configuration: Any) -> str:
        from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

        merged = KubeConfigMerger(os.pathsep.join(map(str, self._files))).config
        if merged is None:
            raise ValueError("there is no such file")
        loader = KubeConfigLoader(merged, self._context, config_base_path=None)
        loader.load_and_set(configuration)
        context = loader.current_context["context"]
        if not configuration.api_key and not configuration.cert_file and _names_plugin(merged, context.get("user")):
            raise ValueError("the program that it names for credentials gave none")
        return str(context.get("namespace") or "default")

    def _renewed(self, access: Access) -> Access:
        try:
            headers = _headers(self._configuration)
        except Exception as exc:  # whatever a plugin's answer does to the package
            raise self._unusable(exc) from None
        if headers == access.headers:
            return access
        return Access(access.url, access.namespace, access.tls, access.server_name, access.proxy, headers)

    def _unusable(self, exc: Exception) -> ConfigError:
        place = "This pod's service account" if self._in_cluster else os.pathsep.join(map(str, self._files))
        is_nowhere = self._in_cluster and "KUBERNETES_SERVICE_HOST" not in self._environ
        return ConfigError(
            "No Kubernetes cluster is configured." if is_nowhere else f"{place} gives no access to a cluster.",
            why="There is no kubeconfig, and this is no pod." if is_nowhere else _said(exc),
            hint="Name a kubeconfig with KUBECONFIG, or a context that it has with --context.",
            code="no-cluster",
        )


def _said(exc: Exception) -> str:
    """Without what the package quotes of the file, which may be a token: that comes after ``in``."""
    text = str(exc).partition(" in ")[0] if str(type(exc).__module__).startswith("kubernetes.") else ""
    if isinstance(exc, (OSError, ValueError)):
        text = str(exc)
    return f"{type(exc).__name__}: {text}"[:300] if text else f"{type(exc).__name__}."


def _kubeconfig_files(kubeconfig: Path | None, environ: Mapping[str, str]) -> list[Path]:
    if kubeconfig is not None:
        return [kubeconfig]
    if environ.get("KUBECONFIG"):
        return [Path(name) for name in environ["KUBECONFIG"].split(os.pathsep) if name]
    return [Path(environ.get("HOME") or "/root") / ".kube/config"]


def _names_plugin(merged: Any, user: str | None) -> bool:
    found = merged["users"].get_with_name(user, safe=True) if user else None
    return found is not None and "exec" in found["user"]


def _headers(configuration: Any) -> dict[str, str]:
    """Who we are; the package renews a token that has grown old when it is asked for this."""
    value = next((each["value"] for each in configuration.auth_settings().values()), None)
    return {"Authorization": str(value)} if value else {}


def _tls(configuration: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
    if not configuration.verify_ssl:  # the user's kubeconfig says so
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file or None)
    return context
