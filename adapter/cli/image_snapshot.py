"""`gpufn snapshot create IMAGE`: runs a function image once, where it serves nobody, and takes its snapshots."""

from __future__ import annotations

import hashlib
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.cli.output import progress
from adapter.errors import ConfigError
from adapter.files import remove_tree
from adapter.hosts import Deployment
from adapter.spec import parse_spec

if TYPE_CHECKING:
    from adapter.hosts.container import ContainerHost

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def function_name(image: str) -> str:
    """``ghcr.io/me/embed:1`` is deployed as ``embed``, unless somebody says otherwise."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0]


async def create_from_image(
    image: str, name: str, namespace: str, variables: tuple[str, ...], state: Path
) -> dict[str, Any]:
    """Take the snapshots of `image` as the function `name` into the state folder. Raises `AdapterError`.

    `image` in its result names the digest that ran, where it came from a registry. Returns ``{"function", "namespace", "image", "key", "bytes", "copied_bytes", "seconds"}``.
    """
    from adapter.hosts.container import ContainerHost
    from adapter.hosts.engine import Engine, socket_path

    name = name or function_name(image)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{image!r} is neither a folder nor an image's name.",
            why=f"It would name the function {name!r}.",
            hint="Name a folder or an image, or its function with --name.",
            code="bad-name",
        )
    home = state / "run" / hashlib.blake2b(image.encode(), digest_size=4).hexdigest()
    engine = Engine(socket_path())
    host = await ContainerHost.open(home, engine, snapshots=state / "snapshots", echo=sys.stderr, network="none")
    try:
        with progress("Image"):
            await host.look(image)
        with progress("Snapshot"):
            names = {"function": name, "namespace": namespace, "image": host.origin(image) or image}
            return {**names, **await host.take_snapshot(_deployment(host, image, name, namespace, variables))}
    finally:
        await host.close()
        remove_tree(home)
        with suppress(OSError):  # others run beside us
            home.parent.rmdir()


def _deployment(host: ContainerHost, image: str, name: str, namespace: str, variables: tuple[str, ...]) -> Deployment:
    config, source = host.config(image)
    pairs = [text.partition("=") for text in variables]
    env = tuple((variable, value) for variable, _, value in pairs)
    return Deployment(name, namespace, "run", image, parse_spec(config, {}, source=source), env)
