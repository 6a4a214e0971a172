"""Which functions a command is about, said the same way everywhere.

A NAME means the function in `openfaas-fn`, or in the namespace that ``-n`` names; ``NAME.NAMESPACE`` says both
at once. Lists show one namespace, and every one with ``-A``. Of a cluster, the namespace is that of the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from adapter.cli.cluster import Cluster
from adapter.errors import NotFound

DEFAULT_NAMESPACE = "openfaas-fn"

_Command = TypeVar("_Command", bound=Callable[..., Any])

namespace_option = click.option(
    "-n", "--namespace", default=DEFAULT_NAMESPACE, show_default=True, help="Namespace of the function."
)


def split_name(name: str, namespace: str) -> tuple[str, str]:
    """Name and namespace: the one inside of `name` wins."""
    bare, _, inside = name.partition(".")
    return bare, inside or namespace


@dataclass(frozen=True, slots=True)
class Scope:
    """The functions that a list shows; None is any."""

    name: str | None
    namespace: str | None

    def has(self, name: str, namespace: str) -> bool:
        return self.name in (None, name) and self.namespace in (None, namespace)

    def is_known(self, state: Path) -> bool:
        """Whether a function of it is deployed, as the gateway of `state` keeps them."""
        return any((state / "functions").glob(f"{self.name or '*'}.{self.namespace or '*'}.json"))

    def require_known(self, state: Path) -> None:
        """For a list that came out empty: raises `NotFound` where a function was named that `state` never had."""
        if self.name is None or self.is_known(state):
            return
        raise NotFound(
            f"No function {self}.",
            why=f"None is deployed under that name in {state}.",
            hint="See what is: gpufn list -A",
            code="function-unknown",
        )

    def __str__(self) -> str:
        """As a function is named where its namespace counts."""
        return ".".join(part for part in (self.name, self.namespace) if part)


EVERYTHING = Scope(None, None)


def scope_options(command: _Command) -> Any:
    """Adds ``[NAME]``, ``-n`` and ``-A``; the command gets one argument `scope`."""
    return click.argument("name", required=False)(namespaces_options(command))


def namespaces_options(command: _Command) -> Any:
    """Adds ``-n`` and ``-A`` alone, for lists of all functions; the command gets one argument `scope`."""

    @wraps(command)
    def with_scope(*, namespace: str | None, all_namespaces: bool, name: str | None = None, **rest: Any) -> Any:
        bare, inside = (None, "") if name is None else split_name(name, "")
        chosen = inside or namespace
        if not chosen and not all_namespaces:
            cluster: Cluster | None = rest.get("cluster")
            chosen = DEFAULT_NAMESPACE if cluster is None else cluster.namespace()
        return command(scope=Scope(bare, None if all_namespaces and not inside else chosen), **rest)

    for option in (
        click.option("-A", "--all-namespaces", is_flag=True, help="Of every namespace."),
        click.option(
            "-n", "--namespace", help=f"Of this namespace [default: {DEFAULT_NAMESPACE}; of a cluster: the context's]."
        ),
    ):
        with_scope = option(with_scope)
    return with_scope
