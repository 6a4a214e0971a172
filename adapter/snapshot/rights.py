"""Capabilities around a restore: what CRIU needs, and what a restored process is left with.

A process is dumped with the capabilities that CRIU's caller had. It shall not serve with them, and it could not
even be restored where the next container has fewer: CRIU would wait for ever for a thread that could not take
them. `give_up` leaves those that belong to CRIU out of the image. It also marks the bounding set as full, so that
CRIU removes nothing from it (which takes CAP_SETPCAP): a restored process is bounded as its container is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapter.errors import SnapshotError
from adapter.snapshot.image import Fields, ImageFile, decode, encode

# linux/capability.h
_SETPCAP, _NET_ADMIN, _SYS_PTRACE, _SYS_ADMIN, _CHECKPOINT_RESTORE = 8, 12, 19, 21, 40
_OF_CRIU = sum(1 << number for number in (_SETPCAP, _NET_ADMIN, _SYS_PTRACE, _CHECKPOINT_RESTORE))

# criu/images/core.proto, creds.proto
_THREAD_CORE, _CREDS = 5, 10
_INHERITABLE, _PERMITTED, _EFFECTIVE, _BOUNDING, _AMBIENT = 9, 10, 11, 12, 19
_HELD = (_INHERITABLE, _PERMITTED, _EFFECTIVE, _AMBIENT)
_WORD = 0xFFFFFFFF


def give_up(images: Path) -> int:
    """Take CRIU's rights out of a dumped image; returns the capabilities that the process still has, as a mask.

    Raises `SnapshotError` on an image it does not understand.
    """
    left = 0
    for path in sorted(images.glob("core-*.img")):
        image = ImageFile.read(path)
        core = decode(image.messages[0])
        for at, (number, wire, value) in enumerate(core):
            if number == _THREAD_CORE and isinstance(value, bytes):
                thread, held = _without_rights(decode(value))
                core[at] = (number, wire, encode(thread))
                left |= held
        image.messages[0] = encode(core)
        image.write()
    return left


def _without_rights(thread: Fields) -> tuple[Fields, int]:
    changed, held = list(thread), 0
    for at, (number, wire, value) in enumerate(thread):
        if number != _CREDS or not isinstance(value, bytes):
            continue
        creds = decode(value)
        words = dict.fromkeys((*_HELD, _BOUNDING), 0)
        for i, (field, kind, word) in enumerate(creds):
            if field not in words:
                continue
            if not isinstance(word, int):
                raise SnapshotError("CRIU image: capabilities are of another form.")
            shift, words[field] = 32 * words[field], words[field] + 1
            kept = _WORD if field == _BOUNDING else word & ~(_OF_CRIU >> shift)
            creds[i] = (field, kind, kept)
            held |= kept << shift if field == _PERMITTED else 0
        changed[at] = (number, wire, encode(creds))
    return changed, held


def why_no_restore(needed: int, status: str | None = None) -> str:
    """Why a process that has the capabilities `needed` cannot be restored by us; empty: nothing is known against it.

    `status` is the text of ``/proc/self/status``.
    """
    mine = _masks(Path("/proc/self/status").read_text() if status is None else status)
    if not mine.get("CapBnd", 0) & (1 << _CHECKPOINT_RESTORE | 1 << _SYS_ADMIN):
        return "The capability CHECKPOINT_RESTORE is not given here."
    if needed & ~mine.get("CapPrm", 0):
        return f"It was dumped with capabilities that are not given here ({needed & ~mine.get('CapPrm', 0):#x})."
    return ""


def _masks(status: str) -> Mapping[str, int]:
    lines = (line.partition(":") for line in status.splitlines())
    return {name: int(value, 16) for name, _, value in lines if name.startswith("Cap")}
