"""The ledger service of a cluster, through its API server: whoever may make a token of its reader may read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapter.cluster.api import Api, Patience
from adapter.cluster.resources import SERVICE_ACCOUNTS, SERVICES
from adapter.errors import NotFound, Unavailable
from adapter.keys import LEDGER_TOKEN_HEADER, SYSTEM_NAMESPACE

READER = "gpufn-reader"
SERVICE = "https:gpufn-ledger:8443"
AUDIENCE = "gpufn-ledger"
_LIFE_S = 600
"""The shortest that Kubernetes gives."""
_PATIENCE = Patience(total_s=60.0, attempts=2)

ALLOW = f"kubectl -n {SYSTEM_NAMESPACE} create rolebinding NAME --role=gpufn-ledger-reader --user=YOU"
INSTALL = "kubectl apply -k manifests/overlays/knative"


class ClusterLedger:
    """`get` is what `adapter.ledger.client.RemoteLedger` asks with, but for its being asynchronous."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._token = ""

    async def get(self, path: str, query: Mapping[str, str]) -> Any:
        """The JSON of an answer. Raises `Unavailable`, with what to do."""
        if not self._token:
            self._token = await self._new_token()
        place = SERVICES.path(SYSTEM_NAMESPACE, SERVICE, "proxy") + path
        headers = {LEDGER_TOKEN_HEADER: self._token}
        try:
            return await self._api.get(place, params=query, headers=headers, patience=_PATIENCE)
        except NotFound as exc:
            raise _not_installed() from exc
        except Unavailable as exc:
            raise _refused(exc) from exc

    async def _new_token(self) -> str:
        asked = {"spec": {"audiences": [AUDIENCE], "expirationSeconds": _LIFE_S}}
        try:
            answer = await self._api.create(SERVICE_ACCOUNTS.path(SYSTEM_NAMESPACE, READER, "token"), asked)
        except NotFound as exc:
            raise _not_installed() from exc
        except Unavailable as exc:
            raise _refused(exc) from exc
        return str(answer["status"]["token"])


def _not_installed() -> Unavailable:
    return Unavailable(
        "This cluster has no ledger of gpufn's.",
        why=f"There is no {READER} or no ledger in the namespace {SYSTEM_NAMESPACE}.",
        hint=f"Install gpufn: {INSTALL}",
        code="not-in-cluster",
    )


def _refused(error: Unavailable) -> Unavailable:
    if error.code == "forbidden":
        why = f"You may not make tokens of {READER}, or not reach the service gpufn-ledger through the API server."
        return Unavailable(
            "You may not read the ledger.", why=why, hint=f"Have an administrator run: {ALLOW}", code="forbidden"
        )
    if error.code == "api-failed":
        return Unavailable(
            "The ledger does not answer.",
            why=error.why,
            hint="See what is wrong with it: gpufn doctor --cluster",
            code="ledger-down",
        )
    return error
