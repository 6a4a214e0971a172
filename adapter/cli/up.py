"""`gpufn up`: serve functions on this machine behind the OpenFaaS API."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from adapter.cli.news import narrate
from adapter.cli.output import note
from adapter.cli.state import state_folder, state_option
from adapter.keys import STACK_FILE


@click.command()
@click.option(
    "--functions", "roots", multiple=True, type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of function folders, or one itself; repeatable. Default: ./functions where it exists, and here.",
)  # fmt: skip
@click.option(
    "--host",
    type=click.Choice(["process", "container"]),
    default="process",
    show_default=True,
    help="What runs functions: processes of this machine, from folders; or its container engine, from images.",
)
@click.option("--network", default="", help="Network of containers. Default: the engine's bridge, else none.")
@click.option("--listen", "address", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--envs", type=click.Path(path_type=Path), help="Folder of Python environments. Default: in the state folder."
)
@click.option("--no-auth", is_flag=True, help="Ask for no password. Loopback only.")
@state_option
def command(
    roots: tuple[Path, ...],
    host: str,
    network: str,
    address: str,
    port: int,
    envs: Path | None,
    no_auth: bool,
    state: Path | None,
) -> None:
    """Serve functions on this machine behind the OpenFaaS API.

    Functions are deployed to it with faas-cli; replicas are processes here, go to zero when idle and
    wake from a snapshot. A first deploy installs the packages of a function, minutes where torch is one; calls
    wait for it. Limits of memory and CPU are shown and not enforced. What happens is said on standard error;
    gpufn -v up writes the log instead. Ctrl-C drains and stops.

    With --host container replicas are containers of Docker or Podman (DOCKER_HOST names its socket), made from
    images that gpufn build, pack or faas-cli built.
    """
    import asyncio
    import logging

    from adapter.errors import ConfigError
    from adapter.openfaas.server import ServerSettings, serve

    if no_auth and address not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"--no-auth with --listen {address} would let anybody run code here.",
            why="Whoever may deploy runs code as this user.",
            hint="Leave --no-auth away, or listen on 127.0.0.1.",
            code="unsafe-listen",
        )
    folders = roots or tuple(folder for folder in (Path("functions"), Path()) if folder.is_dir())
    where = state_folder(state)

    def ready(url: str) -> None:
        from adapter.hosts.folders import FunctionFolders

        found = sorted(FunctionFolders(folders).all().items()) if host == "process" else []
        names = [name for name, _ in found]
        click.echo(f"✓ {url} serves the OpenFaaS API (state in {where})")
        if host == "process":
            note(f"  functions here: {', '.join(names) or 'none; make one with gpufn init NAME'}")
        if not no_auth:
            note(f"  log in:  faas-cli login -g {url} --password-stdin < {where / 'basic-auth-password'}")
        if found:
            note(f"  deploy:  faas-cli deploy -g {url} {deploy_words(*found[0])}")
        elif host == "container":
            note(f"  deploy:  faas-cli deploy -g {url} --image IMAGE --name NAME")

    if not logging.root.isEnabledFor(logging.INFO):  # by -v
        narrate()
    os.umask(0o077)
    settings = ServerSettings(where, folders, address, port, envs, not no_auth, host, network)
    asyncio.run(serve(settings, ready))
    note("✓ stopped")


def deploy_words(name: str, folder: Path) -> str:
    """What deploys that folder, wherever faas-cli runs: without -f it takes a stack.yaml that lies there."""
    stack = folder / STACK_FILE
    if not stack.is_file():
        return f"--image {name} --name {name}"
    here = Path.cwd()
    return f"-f {shlex.quote(str(stack.relative_to(here) if stack.is_relative_to(here) else stack))}"
