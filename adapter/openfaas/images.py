"""What an image says of itself, asked of its registry: which digest its tag is now, and what it was built with.

A replica runs the digest that its deploy saw: all replicas of a revision are the same, and no start waits for a registry
to be asked what a tag is. An image that cannot be looked at is run as it was named, by its annotations alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from adapter.errors import AdapterError, ConfigError, NotFound
from adapter.hosts.container import CONFIG_LABEL, CONTRACT_LABEL
from adapter.keys import CONTRACT_VERSION
from adapter.openfaas.catalog import ImageFacts
from adapter.openfaas.wire import FunctionDeployment
from adapter.registry.client import Client
from adapter.registry.credentials import Credentials, credentials_in
from adapter.registry.reference import Reference, local_architecture

logger = logging.getLogger(__name__)

_LIMIT_S = 20.0
"""A deploy waits no longer for a registry."""
_TIMEOUTS_S = (5.0, 10.0)
_CONFIG_LIMIT_BYTES = 4 * 2**20


PullSecrets = Callable[[str, Sequence[str]], Awaitable[list[bytes]]]
"""The Docker configurations among the secrets of these names in a namespace."""


class Images:
    """`insecure`: hosts of registries that are spoken to without TLS."""

    def __init__(self, pull_secrets: PullSecrets, insecure: Collection[str] = ()) -> None:
        self._pull_secrets = pull_secrets
        self._insecure = frozenset(insecure)

    async def look(self, wanted: FunctionDeployment) -> ImageFacts:
        """Raises `ConfigError` for a reference that is none and for an image that its registry does not have, or that
        is of another contract than ours."""
        reference = Reference.parse(wanted.image)
        try:
            credentials = self._credentials(reference, await self._pull_secrets(wanted.namespace, wanted.secrets))
            work = asyncio.to_thread(_ask, reference, credentials, reference.host in self._insecure)
            return _facts(wanted.image, *await asyncio.wait_for(work, _LIMIT_S))
        except (ConfigError, NotFound):
            raise
        except asyncio.TimeoutError:
            why = f"{reference.host} did not answer in {_LIMIT_S:g} s"
        except AdapterError as error:
            why = (error.why or error.message).rstrip(".")
        logger.info("an image cannot be looked at", extra={"fields": {"image": wanted.image, "why": why}})
        return ImageFacts(wanted.image, note=f"the image could not be looked at: {why}")

    def _credentials(self, reference: Reference, configs: Sequence[bytes]) -> Credentials | None:
        found = (credentials_in(config, reference) for config in configs)
        return next((one for one in found if one is not None), None)


def _ask(
    reference: Reference, credentials: Credentials | None, plain_http: bool
) -> tuple[Reference, dict[str, Any]]:  # positional: a thread's
    """The image by digest, and its configuration for this machine's architecture."""
    with Client(reference, credentials, plain_http=plain_http, timeouts_s=_TIMEOUTS_S) as client:
        reference = reference.at(client.get_manifest(reference.wanted).descriptor.digest)
    with Client(reference, credentials, plain_http=plain_http, timeouts_s=_TIMEOUTS_S) as client:
        manifest = client.get_manifest(client.resolve(local_architecture()).digest)
        config = manifest.data.get("config")
        digest, size = (config.get("digest"), config.get("size")) if isinstance(config, dict) else (None, None)
        if not isinstance(digest, str) or not isinstance(size, int) or size > _CONFIG_LIMIT_BYTES:
            raise ConfigError(f"{reference} is no image that can be run.", why="Its manifest names no configuration.")
        said = json.loads(bytes(client.get_blob(digest, size)))
        return reference, said if isinstance(said, dict) else {}


def _facts(image: str, pinned: Reference, said: Mapping[str, Any]) -> ImageFacts:
    runs = said.get("config")
    runs = runs if isinstance(runs, dict) else {}
    labels = runs.get("Labels")
    labels = labels if isinstance(labels, dict) else {}
    variables = dict(line.partition("=")[::2] for line in runs.get("Env") or () if isinstance(line, str))
    contract = labels.get(CONTRACT_LABEL)
    if contract not in (None, str(CONTRACT_VERSION)):
        raise ConfigError(
            f"The image {image} is no function that this gpufn can run.",
            why=f"Its contract is version {contract}, ours is {CONTRACT_VERSION}.",
            hint="Build it with gpufn build, pack or faas-cli, of this version.",
            code="image-foreign",
        )
    return ImageFacts(
        str(pinned),
        is_ours=contract is not None,
        config=_config(image, labels),
        user=str(runs.get("User") or ""),
        python_path=variables.get("PYTHONPATH", ""),
        note="" if contract is not None else "the image was not built by gpufn: its requests are not held",
    )


def _config(image: str, labels: Mapping[str, Any]) -> dict[str, Any]:
    try:
        config = json.loads(labels.get(CONFIG_LABEL) or "{}")
    except (ValueError, TypeError):
        config = None
    if not isinstance(config, dict):
        raise ConfigError(f"The label {CONFIG_LABEL} of {image} is no JSON object.", code="image-foreign")
    return config
