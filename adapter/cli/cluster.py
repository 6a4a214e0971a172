"""Which cluster a command is about, said the same way everywhere, and a way to ask it.

``--cluster`` means the one of the kubeconfig's current context, ``--context`` and ``--kubeconfig`` name another; without
any of them a command is about the gateway of `gpufn up`. Commands that only a cluster can answer need no ``--cluster``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapter.cli.interrupt import run_interruptible
from adapter.errors import ConfigError

if TYPE_CHECKING:
    from adapter.cluster.api import Api
    from adapter.cluster.credentials import Credentials

_Command = TypeVar("_Command", bound=Callable[..., Any])
_T = TypeVar("_T")

_context_option = click.option(
    "--context", metavar="NAME", envvar="GPUFN_CONTEXT", show_envvar=True, help="Context of the kubeconfig."
)
_kubeconfig_option = click.option(
    "--kubeconfig", type=click.Path(path_type=Path, dir_okay=False), envvar="GPUFN_KUBECONFIG", show_envvar=True,
    help="File that says how to reach clusters. Default: as kubectl has it.",
)  # fmt: skip
_cluster_option = click.option(
    "--cluster/--no-cluster", "wants_cluster", default=None, envvar="GPUFN_CLUSTER", show_envvar=True,
    help="Of the Kubernetes cluster of the current context, or of the gateway [default: the gateway].",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Connection:
    """One cluster's API, from code that is not asynchronous."""

    api: Api
    _loop: asyncio.AbstractEventLoop

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return run_interruptible(work, self._loop.run_until_complete)


class Cluster:
    """A cluster that was chosen; None is the usual one, as kubectl finds it. Errors are `AdapterError`s."""

    def __init__(self, context: str | None = None, kubeconfig: Path | None = None) -> None:
        self._context, self._kubeconfig = context, kubeconfig

    @cached_property
    def _credentials(self) -> Credentials:
        for package in ("aiohttp", "kubernetes"):
            if find_spec(package) is None:
                raise ConfigError(
                    "This installation cannot talk to clusters.",
                    why=f"The package {package} is not installed.",
                    hint="Install it with: pip install 'gpufn[cli,kube]'",
                    code="not-installed",
                )
        from adapter.cluster.credentials import Credentials

        return Credentials(self._kubeconfig, self._context)

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """A way to its API."""
        credentials = self._credentials
        from adapter.cluster.api import Api

        api = Api(credentials)
        loop = asyncio.new_event_loop()
        try:
            connection = Connection(loop.run_until_complete(api.__aenter__()), loop)
            try:
                yield connection
            finally:
                loop.run_until_complete(api.__aexit__(None, None, None))
        finally:
            loop.run_until_complete(_end_tasks())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def ask(self, question: Callable[[Api], Coroutine[Any, Any, _T]]) -> _T:
        """What `question` finds out."""
        with self.connected() as connection:
            return connection.wait(question(connection.api))

    def namespace(self) -> str:
        """The one of its context."""
        return self.ask(lambda api: api.namespace())


async def _end_tasks() -> None:
    """Of several questions that were asked at once, those that nobody waits for since one failed."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def cluster_options(command: _Command) -> Any:
    """Adds ``--cluster``, ``--context`` and ``--kubeconfig``; the command gets `cluster`, None for the gateway."""

    @wraps(command)
    def chosen(*, wants_cluster: bool | None, context: str | None, kubeconfig: Path | None, **rest: Any) -> Any:
        if wants_cluster is None:
            wants_cluster = context is not None or kubeconfig is not None
        return command(cluster=Cluster(context, kubeconfig) if wants_cluster else None, **rest)

    return _cluster_option(_context_option(_kubeconfig_option(chosen)))


def only_cluster_options(command: _Command) -> Any:
    """The same for a command that is about a cluster always."""

    @wraps(command)
    def chosen(*, context: str | None, kubeconfig: Path | None, **rest: Any) -> Any:
        return command(cluster=Cluster(context, kubeconfig), **rest)

    return _context_option(_kubeconfig_option(chosen))
