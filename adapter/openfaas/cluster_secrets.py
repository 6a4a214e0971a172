"""Secrets of functions as Secrets of their namespace: those that carry OpenFaaS's label, and, to pull images with, those
of Docker's types. Values are read only where they are needed, and never kept."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.resources import SECRETS
from adapter.errors import ConfigError, Conflict, NotFound
from adapter.hosts import Deployment
from adapter.hosts.kubernetes_pods import MANAGED_BY
from adapter.openfaas.catalog import secret_exists, unknown_secret

MANAGER = "openfaas"
"""Value of the label `MANAGED_BY`, as OpenFaaS's own provider writes it."""

_DOCKER_CONFIG, _OLD_DOCKER_CONFIG = "kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg"
_DOCKER_KEY = ".dockerconfigjson"


class ClusterSecrets:
    """Methods raise `Unavailable` where the API server does not answer or does not allow it."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def names(self, namespace: str) -> list[str]:
        selector = f"{MANAGED_BY}={MANAGER}"
        found = await self._api.list(SECRETS.path(namespace), _name_of, label_selector=selector)
        return sorted(found.items)

    async def missing(self, namespace: str, names: Sequence[str]) -> list[str]:
        """Those that do not exist. Raises `ConfigError` for one that a function may not have."""
        missing = []
        for name in names:
            secret = await self._get(namespace, name)
            if secret is None:
                missing.append(name)
            else:
                _check_ours(namespace, name, secret)
        return missing

    async def put(self, namespace: str, name: str, value: bytes, *, new: bool) -> None:
        """Raises `Conflict`, `NotFound`."""
        data = {name: base64.b64encode(value).decode()}
        if new:
            body = SECRETS.body(name, namespace, metadata={"labels": {MANAGED_BY: MANAGER}}, type="Opaque", data=data)
            try:
                await self._api.create(SECRETS.path(namespace), body)
            except Conflict as error:
                raise secret_exists(namespace, name) from error
            return
        await self._managed(namespace, name)
        try:
            await self._api.patch(SECRETS.path(namespace, name), {"data": data})
        except NotFound as error:
            raise unknown_secret(namespace, name) from error

    async def remove(self, namespace: str, name: str) -> None:
        """Raises `NotFound`."""
        secret = await self._managed(namespace, name)
        await self._api.delete(SECRETS.path(namespace, name), uid=secret["metadata"]["uid"])

    async def for_pulling(self, deployment: Deployment) -> Collection[str]:
        """Which of a deployment's secrets are Docker configurations.

        Raises `ConfigError` for one that a function may not have: others than us may have written what it names.
        """
        found = set()
        for name in deployment.secrets:
            secret = await self._get(deployment.namespace, name)
            if secret is not None:
                _check_ours(deployment.namespace, name, secret)
                if _is_for_pulling(secret):
                    found.add(name)
        return frozenset(found)

    async def docker_configs(self, namespace: str, names: Sequence[str]) -> list[bytes]:
        """Their values."""
        found = [await self._get(namespace, name) for name in names]
        configs = [
            secret["data"].get(_DOCKER_KEY) for secret in found if secret is not None and _is_for_pulling(secret)
        ]
        return [base64.b64decode(config) for config in configs if config]

    async def _managed(self, namespace: str, name: str) -> dict[str, Any]:
        secret = await self._get(namespace, name)
        if secret is None or not _is_managed(secret):
            raise unknown_secret(namespace, name)
        return secret

    async def _get(self, namespace: str, name: str) -> dict[str, Any] | None:
        try:
            return await self._api.get(SECRETS.path(namespace, name))
        except NotFound:
            return None


def _check_ours(namespace: str, name: str, secret: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for one that functions may not have."""
    if not (_is_managed(secret) or _is_for_pulling(secret)):
        raise ConfigError(
            f"The secret {name} is not one of functions.",
            why=f"It is in the namespace {namespace}, without the label {MANAGED_BY}={MANAGER}.",
            hint=f"If functions may read it: kubectl -n {namespace} label secret {name} {MANAGED_BY}={MANAGER}",
            code="secret-foreign",
        )


def _name_of(secret: Mapping[str, Any]) -> str:
    return str(secret["metadata"]["name"])


def _is_managed(secret: Mapping[str, Any]) -> bool:
    return bool((secret["metadata"].get("labels") or {}).get(MANAGED_BY) == MANAGER)


def _is_for_pulling(secret: Mapping[str, Any]) -> bool:
    return secret.get("type") in (_DOCKER_CONFIG, _OLD_DOCKER_CONFIG)
