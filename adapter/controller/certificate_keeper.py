"""Keeps the certificates with which the API server and agents know our Services: made, published, renewed in time.

Everything is derived from the Secret `gpufn-ca`, which only the controller may read. A new authority is published before
it signs anything, and what the old one signed stays trusted, so that nobody who is a minute late notices. Killed at any
point, the next pass goes on from what is there.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.certificates import (
    Pair,
    begins_at,
    bundle_of,
    issue,
    make_authority,
    names_of,
    renew_at,
    signed_by,
    why_not,
)
from adapter.cluster.informer import Informer
from adapter.cluster.json_parts import object_in, objects_in
from adapter.cluster.resources import CONFIG_MAPS, MUTATING_WEBHOOKS, SECRETS
from adapter.errors import NotFound
from adapter.keys import AGENT_NAMESPACE, SYSTEM_NAMESPACE

logger = logging.getLogger(__name__)

AUTHORITY = "gpufn-ca"
"""Name of the Secret with the authority, and of the ConfigMaps with those to trust (``ca.crt``)."""
SERVICES = {"gpufn-webhook-tls": "gpufn-webhook", "gpufn-ledger-tls": "gpufn-ledger"}
"""Secrets with serving certificates, and the Services they are for."""
WEBHOOKS = "gpufn"

_SETTLED = dt.timedelta(minutes=10)
"""The kubelet takes a minute or two to bring a new bundle to whoever mounts it: nothing is signed anew before."""
_LOOK_S = 120.0
"""Until the next pass, whatever is due: somebody may have removed or replaced what we keep."""


def _without_authority(configuration: Mapping[str, Any]) -> tuple[str, ...]:
    webhooks = objects_in(configuration, "webhooks")
    return tuple(str(each.get("name")) for each in webhooks if not object_in(each, "clientConfig").get("caBundle"))


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


class CertificateKeeper:
    """A reconciler with one key."""

    name = "certificates"

    def __init__(self, api: Api, clock: Callable[[], dt.datetime] = _now) -> None:
        self._api, self._clock = api, clock
        self.unknown: Informer[tuple[str, ...]] = Informer(
            api, MUTATING_WEBHOOKS.path(), _without_authority, field_selector=f"metadata.name={WEBHOOKS}"
        )
        """Webhooks that the API server has no authority to know by: those that an overlay has just added. To be run."""

    def start(self, changed: Callable[[str], None]) -> None:
        def on_webhooks(_key: str, _old: tuple[str, ...] | None, new: tuple[str, ...] | None) -> None:
            if new:
                changed(WEBHOOKS)

        self.unknown.on_change(on_webhooks)

    def all_keys(self) -> Iterable[str]:
        return [WEBHOOKS]

    async def reconcile(self, key: str) -> float:
        now = self._clock()
        authority, bundle = await self._authority(now)
        for namespace in (SYSTEM_NAMESPACE, AGENT_NAMESPACE):
            await self._publish(namespace, bundle)
        await self._trust(bundle)
        for secret, service in SERVICES.items():
            await self._serving(secret, service, authority, bundle, now)
        return _LOOK_S

    async def _authority(self, now: dt.datetime) -> tuple[Pair, bytes]:
        """The one that signs, and all that are to be trusted."""
        secret = await self._secret(AUTHORITY)
        pair, previous = _pair(secret, "ca.crt", "ca.key"), _data(secret, "previous.crt")
        problem = why_not(pair, now) if secret else "missing"
        if not problem and now < renew_at(pair.certificate):
            return pair, bundle_of([pair.certificate, previous], now)
        new = make_authority(now)
        previous = bundle_of([pair.certificate, previous], now)
        data = {"ca.crt": new.certificate, "ca.key": new.key, "previous.crt": previous}
        await self._write(AUTHORITY, secret, "Opaque", data)
        logger.warning("a new certificate authority", extra={"fields": {"why": problem or "due"}})
        return new, bundle_of([new.certificate, previous], now)

    async def _publish(self, namespace: str, bundle: bytes) -> None:
        path = CONFIG_MAPS.path(namespace, AUTHORITY)
        try:
            await self._api.apply(
                path, CONFIG_MAPS.body(AUTHORITY, namespace, data={"ca.crt": bundle.decode()}), force=True
            )
        except NotFound:  # this namespace is not everywhere
            logger.info("no namespace for the certificate authority", extra={"fields": {"namespace": namespace}})

    async def _trust(self, bundle: bytes) -> None:
        """Have the API server know our webhooks by it."""
        path = MUTATING_WEBHOOKS.path(name=WEBHOOKS)
        try:
            configuration = await self._api.get(path)
        except NotFound:
            logger.info("no webhooks are configured", extra={"fields": {"name": WEBHOOKS}})
            return
        text = base64.b64encode(bundle).decode()
        operations: list[dict[str, Any]] = []
        for index, webhook in enumerate(configuration.get("webhooks") or ()):
            if webhook["clientConfig"].get("caBundle") != text:
                place = f"/webhooks/{index}"
                operations += [
                    {"op": "test", "path": f"{place}/name", "value": webhook["name"]},
                    {"op": "add", "path": f"{place}/clientConfig/caBundle", "value": text},
                ]
        if operations:
            await self._api.patch(path, operations)

    async def _serving(self, name: str, service: str, authority: Pair, bundle: bytes, now: dt.datetime) -> None:
        secret = await self._secret(name)
        pair = _pair(secret, "tls.crt", "tls.key")
        host = f"{service}.{SYSTEM_NAMESPACE}.svc"
        names = [host, f"{host}.cluster.local", f"{service}.{SYSTEM_NAMESPACE}", service]
        problem = why_not(pair, now) if secret else "missing"
        if not problem and names_of(pair.certificate) != frozenset(names):
            problem = "for other names"
        if not problem and not signed_by(pair.certificate, bundle):
            problem = "signed by another"
        is_settled = now >= begins_at(authority.certificate) + _SETTLED
        if not problem and not (is_settled and now >= renew_at(pair.certificate)):
            return
        new = issue(authority, names, now)
        data = {"tls.crt": new.certificate, "tls.key": new.key, "ca.crt": bundle}
        await self._write(name, secret, "kubernetes.io/tls", data)
        logger.info("a new certificate", extra={"fields": {"service": service, "why": problem or "due"}})

    async def _secret(self, name: str) -> dict[str, Any]:
        """Empty where there is none."""
        try:
            return await self._api.get(SECRETS.path(SYSTEM_NAMESPACE, name))
        except NotFound:
            return {}

    async def _write(self, name: str, old: Mapping[str, Any], kind: str, data: Mapping[str, bytes]) -> None:
        """Raises `Conflict` where somebody else has written it since `old` was read."""
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        if old:
            await self._api.replace(SECRETS.path(SYSTEM_NAMESPACE, name), {**old, "data": encoded})
        else:
            labels = {"app.kubernetes.io/name": "gpufn"}
            body = SECRETS.body(name, SYSTEM_NAMESPACE, type=kind, data=encoded, metadata={"labels": labels})
            await self._api.create(SECRETS.path(SYSTEM_NAMESPACE), body)


def _pair(secret: Mapping[str, Any], certificate: str, key: str) -> Pair:
    return Pair(_data(secret, certificate), _data(secret, key))


def _data(secret: Mapping[str, Any], key: str) -> bytes:
    try:
        return base64.b64decode((secret.get("data") or {}).get(key) or "", validate=True)
    except (binascii.Error, ValueError, TypeError):
        return b""
