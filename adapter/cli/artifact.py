"""`gpufn snapshot push`, `pull`, and `inspect` of an image: snapshots beside images in a registry."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapter.cli.kept import Kept, kept
from adapter.cli.output import Column, Output, note, output_options, progress, show
from adapter.cli.state import state_folder, state_option
from adapter.errors import Conflict, NotFound, SnapshotCorrupt
from adapter.snapshot.image_weights import KEY_PREFIX
from adapter.snapshot.store import Snapshot, Store
from adapter.units import format_size

if TYPE_CHECKING:
    from adapter.registry.client import Client, Descriptor
    from adapter.registry.push import Progress

_IMAGE_CONFIG_LIMIT_BYTES = 2**20
_ID = re.compile(r"[0-9]{1,9}")

plain_http_option = click.option(
    "--plain-http", is_flag=True, help="Speak HTTP without TLS; on this machine that is the default."
)


def is_image(text: str) -> bool:
    """Whether an argument names an image: a function or a key has neither of these."""
    return "/" in text or "@" in text


@click.command("push")
@click.argument("image")
@click.option("--snapshot", "which", metavar="FUNCTION|KEY", help="Which one, where there are several.")
@click.option(
    "--from", "source", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of snapshots. Default: that of the state folder.",
)  # fmt: skip
@click.option("--level", type=click.IntRange(1, 19), default=3, show_default=True, help="How hard zstd tries.")
@plain_http_option
@state_option
@output_options
def push_command(
    image: str, which: str | None, source: Path | None, level: int, plain_http: bool, state: Path | None, output: Output
) -> None:
    """Put a process snapshot into the registry, beside the IMAGE that it was taken of.

    It belongs to the image's digest, not to its tag; weights that it needs go with it. The snapshot is memory: who may
    read the repository may read it. Credentials are those of `docker login` or `podman login`.
    """
    store = Store(source or state_folder(state) / "snapshots")
    rows = push_snapshots(store, _chosen(kept(store), which, image), image, level, plain_http=plain_http)
    output.rows(rows, [*_COLUMNS_OF_TRANSFER, Column("SENT", "sent_bytes", format_size, right=True)], name="digest")
    if output.for_people:
        note(f"  next, on another machine: gpufn snapshot pull {image}")


def push_snapshots(
    store: Store, snapshot: Snapshot, image: str, level: int = 3, *, plain_http: bool = False
) -> list[dict[str, object]]:
    """Send a snapshot, and the weights that it needs, beside `image`; a row for each. Raises `AdapterError`."""
    from adapter.registry.push import push

    rows: list[dict[str, object]] = []
    with _connected(image, plain_http) as (client, subject):
        for item in _with_needed(store, snapshot):
            with _meter(f"Push {item.kind} {item.key}") as on_progress:
                pushed = push(client, subject, item, level=level, on_progress=on_progress)
            rows.append(
                {
                    "image": f"{client.reference.host}/{client.reference.repository}",
                    "subject": pushed.subject,
                    "digest": pushed.digest,
                    "kind": pushed.kind,
                    "key": pushed.key,
                    "size_bytes": pushed.size_bytes,
                    "compressed_bytes": pushed.compressed_bytes,
                    "sent_bytes": pushed.sent_bytes,
                }
            )
    return rows


@click.command("pull")
@click.argument("image")
@click.option(
    "--into", type=click.Path(path_type=Path, file_okay=False),
    help="Folder of snapshots, as replicas get it (GPUFN_SNAPSHOT_DIR). Default: that of the state folder.",
)  # fmt: skip
@click.option("--function", metavar="NAME[.NAMESPACE]", help="For this function. Default: the one it was taken of.")
@click.option("--tenant", default="default", show_default=True, help="For this tenant.")
@plain_http_option
@state_option
@output_options
def pull_command(
    image: str,
    into: Path | None,
    function: str | None,
    tenant: str,
    plain_http: bool,
    state: Path | None,
    output: Output,
) -> None:
    """Fetch the snapshots of IMAGE that fit this machine.

    Every byte is checked before it counts, and a pull that was interrupted goes on where it was. A snapshot is memory
    that will run: name images of registries that you trust, best by digest.
    """
    from adapter.cli.scope import DEFAULT_NAMESPACE, split_name
    from adapter.registry.pull import choose, pull, snapshots_of
    from adapter.snapshot.identity import machine_identity

    os.umask(0o077)
    store = Store(into or state_folder(state) / "snapshots")
    name = ".".join(split_name(function, DEFAULT_NAMESPACE)) if function else ""
    machine = machine_identity()
    rows = []
    with _connected(image, plain_http) as (client, subject):
        owner = _owner(client, subject)
        for entry in choose(snapshots_of(client, subject.digest), machine, image):
            with _meter(f"Pull {entry.kind} {entry.key}") as on_progress:
                pulled = pull(
                    client,
                    subject.digest,
                    entry.descriptor,
                    store,
                    machine,
                    tenant=tenant,
                    function=name,
                    owner=owner,
                    on_progress=on_progress,
                )
            rows.append(
                {
                    "image": f"{client.reference.host}/{client.reference.repository}",
                    "subject": subject.digest,
                    "digest": pulled.digest,
                    "function": pulled.snapshot.function,
                    "kind": pulled.snapshot.kind,
                    "key": pulled.snapshot.key,
                    "path": str(pulled.snapshot.path),
                    "size_bytes": pulled.size_bytes,
                    "received_bytes": pulled.received_bytes,
                }
            )
    columns = [
        Column("FUNCTION", "function"),
        Column("KIND", "kind"),
        Column("KEY", "key"),
        Column("SIZE", "size_bytes", format_size, right=True),
        Column("RECEIVED", "received_bytes", format_size, right=True),
        Column("PATH", "path", wide=True),
    ]
    output.rows(rows, columns, name="path")


def inspect_image(image: str, plain_http: bool, output: Output) -> None:
    """Print the snapshots that lie beside an image, and whether each fits here."""
    from adapter.registry.pull import snapshots_of
    from adapter.snapshot.identity import machine_identity

    machine = machine_identity()
    with _connected(image, plain_http) as (client, subject):
        rows = [
            {
                "subject": subject.digest,
                "digest": entry.descriptor.digest,
                "function": entry.function,
                "kind": entry.kind,
                "key": entry.key,
                "size_bytes": entry.size,
                "compressed_bytes": entry.compressed_size,
                "created": entry.created,
                "fits_here": not entry.differs_in(machine),
                "differs_in": entry.differs_in(machine),
                "identity": entry.identity,
            }
            for entry in snapshots_of(client, subject.digest)
        ]
    columns = [
        Column("FUNCTION", "function"),
        *_COLUMNS_OF_TRANSFER,
        Column("CREATED", "created"),
        Column("FITS HERE", "fits_here", lambda fits: "yes" if fits else "no"),
        Column("DIFFERS IN", "differs_in", show),
        Column("DIGEST", "digest", wide=True),
    ]
    empty = f"{image} has no snapshot in the registry. Push one with: gpufn snapshot push {image}"
    output.rows(rows, columns, name="digest", empty=empty)


_COLUMNS_OF_TRANSFER = [
    Column("KIND", "kind"),
    Column("KEY", "key"),
    Column("SIZE", "size_bytes", format_size, right=True),
    Column("COMPRESSED", "compressed_bytes", format_size, right=True),
]


@contextmanager
def _connected(image: str, plain_http: bool) -> Iterator[tuple[Client, Descriptor]]:
    """A client of the image's repository, and the image manifest that `image` means on this machine."""
    from adapter.registry.client import Client
    from adapter.registry.credentials import find_credentials
    from adapter.registry.reference import Reference, local_architecture

    reference = Reference.parse(image)
    with Client(reference, find_credentials(reference), plain_http=plain_http) as client:
        yield client, client.resolve(local_architecture())


def _owner(client: Client, subject: Descriptor) -> tuple[int, int] | None:
    """Numbers of the user and group that replicas of the image run as, where root pulls for them; None: our own.

    An image that names its user instead is root's to hand over: the name is in a file of its layers.
    """
    from adapter.registry.client import Descriptor

    if os.geteuid() != 0:
        return None
    config = Descriptor.from_json(client.get_manifest(subject.digest).data.get("config"))
    if config.size > _IMAGE_CONFIG_LIMIT_BYTES:
        return None
    try:
        user = str(json.loads(bytes(client.get_blob(config.digest, config.size)))["config"]["User"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    name, _, group = user.partition(":")
    if not _ID.fullmatch(name) or not _ID.fullmatch(group or name) or int(name) == 0:
        return None
    return int(name), int(group or name)


def _chosen(items: list[Kept], which: str | None, image: str) -> Snapshot:
    """The process snapshot that is meant. Raises `NotFound`, `Conflict` and `SnapshotCorrupt`."""
    processes = [item for item in items if item.kind == "process"]
    if which is not None:
        bare, _, namespace = which.partition(".")
        processes = [item for item in processes if item.key.startswith(which) or item.function == which
                     or (not namespace and item.function.partition(".")[0] == bare)]  # fmt: skip
    if not processes:
        raise NotFound(
            "No process snapshot here" + (f" that {which!r} names." if which else "."),
            hint="Take one with: gpufn snapshot create; or see what there is: gpufn snapshot list -A",
            code="no-snapshot",
        )
    if len({item.function for item in processes}) > 1:
        raise Conflict(
            "There is more than one snapshot to push.",
            why=", ".join(f"{item.key} ({item.function})" for item in processes) + ".",
            hint=f"Name one: gpufn snapshot push {image} --snapshot {processes[0].key}",
            code="ambiguous-key",
        )
    sound = [item.snapshot for item in processes if item.snapshot is not None]
    if not sound:
        raise SnapshotCorrupt(f"The snapshot {processes[0].key} is damaged.", why=processes[0].damage)
    return max(sound, key=lambda snapshot: snapshot.created_at_ns)


def _with_needed(store: Store, process: Snapshot) -> list[Snapshot]:
    """The snapshot, after the weights that it cannot do without. Raises `NotFound`."""
    key = process.facts.get("weights")
    if not key or str(key).startswith(KEY_PREFIX):  # in it, or in the image
        return [process]
    for snapshot in (item.snapshot for item in kept(store)):
        if snapshot is None or (snapshot.tenant, snapshot.function) != (process.tenant, process.function):
            continue
        if snapshot.kind == "weights" and snapshot.key == key:
            return [snapshot, process]
    raise NotFound(
        f"The weights {str(key)[:40]} of the snapshot {process.key} are gone.",
        hint="Take a new snapshot: gpufn snapshot create",
        code="no-snapshot",
    )


@contextmanager
def _meter(text: str) -> Iterator[Progress]:
    """A progress line that counts bytes; called from any thread."""
    lock, began = threading.Lock(), time.monotonic()
    with progress(text) as line:

        def on_progress(done: int, total: int) -> None:
            with lock:
                rate = done / max(1e-3, time.monotonic() - began)
                line.update(
                    f"{text}  {_bar(done, total)}  {format_size(done)} of {format_size(total)}, {format_size(round(rate))}/s"
                )

        yield on_progress


def _bar(done: int, total: int, width: int = 20) -> str:
    filled = width if total == 0 else width * done // total
    return "█" * filled + "░" * (width - filled)


def register(group: click.Group) -> None:
    """Add the commands to the group `snapshot`."""
    group.add_command(push_command)
    group.add_command(pull_command)
