"""CRIU images whose memory is mapped on restore, not copied.

`criu dump` writes the private memory of a process to ``pages-1.img``, and `criu restore` copies every
page of it back: half a gigabyte for a process that imported torch, of which a request touches a tenth.
`map_memory` moves the large areas into one sparse file, ``memory.img``, and rewrites the image so that
these areas are private mappings of that file. A restore is then a few hundred `mmap` calls; pages come
from the page cache when they are touched, and replicas of one snapshot share those they only read.
The process cannot tell: a private mapping reads and writes like its own memory.

Areas of files that will be gone (what compilers made, see `compile_caches`) move there too, however small.

The file is named `MEMORY_NAME` inside the image and handed to CRIU as a descriptor, so that an image
works in whatever folder it lies. Image format: CRIU's ``images/*.proto`` (protobuf messages behind a
magic, each with its length before it) and ``criu/include/image.h`` (the flags below), CRIU 4.1.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapter.errors import SnapshotError

PAGE_BYTES = 4096
MEMORY_FILE = "memory.img"
MEMORY_NAME = "gpufn/memory.img"
"""How the image calls the memory file; `criu restore --inherit-fd fd[N]:gpufn/memory.img` supplies it."""

MIN_AREA_PAGES = 64
"""Smaller areas stay with CRIU: copying 256 KiB costs less than a mapping and its faults."""

_GAP_BYTES = 2**30
"""Hole after each area in the memory file, where an area that `mremap` grows finds zeros and no end of file."""

_COPY_BYTES = 2**20
"""Of a copy through our own memory, at once."""

_RESETTING_ALLOCATORS = ("jemalloc", "mimalloc", "tcmalloc")
"""Allocators that rely on MADV_DONTNEED giving zeros, which a mapped file does not; glibc's does not rely on it."""

# criu/include/image.h
_VMA_STACK, _VMA_VSYSCALL, _VMA_VDSO, _VMA_HEAP = 1 << 1, 1 << 2, 1 << 3, 1 << 5
_VMA_FILE_PRIVATE, _VMA_FILE_SHARED, _VMA_ANON_PRIVATE = 1 << 6, 1 << 7, 1 << 9
_VMA_SPECIAL = _VMA_STACK | _VMA_VSYSCALL | _VMA_VDSO | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 15
_PAGE_PRESENT = 1 << 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_GROWSDOWN, _MAP_HUGETLB = 0x01, 0x02, 0x20, 0x100, 0x40000
_FILE_IS_REGULAR = 1
_O_LARGEFILE = 0o100000

Fields = list[tuple[int, int, "int | bytes"]]
"""A decoded protobuf message: (field number, wire type, value) in order."""


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(data: bytes) -> Fields:
    """The fields of a protobuf message. Raises `SnapshotError` on anything that is none."""
    fields: Fields = []
    at = 0
    try:
        while at < len(data):
            key, at = _read_varint(data, at)
            number, wire = key >> 3, key & 7
            value: int | bytes
            if wire == 0:
                value, at = _read_varint(data, at)
            elif wire == 2:
                length, at = _read_varint(data, at)
                value, at = data[at : at + length], at + length
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
                value, at = data[at : at + length], at + length
            else:
                raise SnapshotError(f"CRIU image: wire type {wire}", why="It is no protobuf message.")
            fields.append((number, wire, value))
    except IndexError as exc:
        raise SnapshotError("CRIU image: a message ends early.", why="The file is truncated.") from exc
    return fields


def encode(fields: Fields) -> bytes:
    """The protobuf message of `fields`; ``encode(decode(m)) == m`` for canonical messages."""
    out = bytearray()
    for number, wire, value in fields:
        out += _varint(number << 3 | wire)
        if isinstance(value, int):
            out += _varint(value)
        else:
            out += (_varint(len(value)) if wire == 2 else b"") + value
    return bytes(out)


def _number(fields: Fields, number: int, default: int = 0) -> int:
    for found, _, value in fields:
        if found == number and isinstance(value, int):
            return value
    return default


def _bytes(fields: Fields, number: int) -> bytes | None:
    for found, _, value in fields:
        if found == number and isinstance(value, bytes):
            return value
    return None


def _with(fields: Fields, changes: dict[int, int]) -> Fields:
    return [(n, wire, changes.get(n, value) if wire == 0 else value) for n, wire, value in fields]


@dataclass
class ImageFile:
    """One ``.img`` file: eight bytes of magic, then messages."""

    path: Path
    magic: bytes
    messages: list[bytes]

    @classmethod
    def read(cls, path: Path) -> ImageFile:
        data = path.read_bytes()
        messages, at = [], 8
        while at < len(data):
            if at + 4 > len(data):
                raise SnapshotError(f"CRIU image {path.name} is truncated.")
            (length,) = struct.unpack_from("<I", data, at)
            message = data[at + 4 : at + 4 + length]
            if len(message) != length:
                raise SnapshotError(f"CRIU image {path.name} is truncated.")
            messages.append(message)
            at += 4 + length
        return cls(path, data[:8], messages)

    def write(self) -> None:
        with self.path.open("wb") as file:
            file.write(self.magic)
            for message in self.messages:
                file.write(struct.pack("<I", len(message)) + message)


@dataclass(frozen=True)
class _Run:
    """Consecutive dumped pages: address, length and place in the pages file, all in bytes."""

    start: int
    end: int
    offset: int
    present: bool
    message: Fields


@dataclass(frozen=True)
class _Area:
    """One memory area of the process (a `vma_entry`)."""

    start: int
    end: int
    file_id: int
    file_offset: int
    flags: int
    status: int
    message: Fields

    @classmethod
    def decode(cls, data: bytes) -> _Area:
        fields = decode(data)
        start, end, file_id, offset, flags, status = (_number(fields, n) for n in (1, 2, 4, 3, 6, 7))
        return cls(start, end, file_id, offset, flags, status, fields)

    @property
    def of_file(self) -> bool:
        return bool(self.status & (_VMA_FILE_PRIVATE | _VMA_FILE_SHARED))

    @property
    def can_be_mapped(self) -> bool:
        is_private = self.status & (_VMA_FILE_PRIVATE | _VMA_ANON_PRIVATE)
        is_special = self.status & _VMA_SPECIAL or self.flags & (_MAP_GROWSDOWN | _MAP_HUGETLB)
        return bool(is_private) and not is_special


@dataclass(frozen=True, slots=True)
class MappedMemory:
    """What `map_memory` did: areas now mapped, bytes in the memory file and bytes left to copy."""

    areas: int
    mapped_bytes: int
    copied_bytes: int


def map_memory(folder: Path, pid: int, going: Path | None = None) -> MappedMemory:
    """Rewrite the image of the single process `pid` in `folder`; see the module's docstring.

    No restore needs a file below the folder `going` any more. Memory of the process's own stays with CRIU
    where its allocator would not bear a mapped file.
    Raises `SnapshotError` on an image it does not understand and `OSError` on a full disk; the folder
    is then of no use any more.
    """
    memory_map = ImageFile.read(folder / f"mm-{pid}.img")
    pagemap = ImageFile.read(folder / f"pagemap-{pid}.img")
    files = ImageFile.read(folder / "files.img")
    runs = _runs(pagemap)
    names = _regular_files(files)
    copied = sum(run.end - run.start for run in runs if run.present)
    gone = _below(going, names)
    _refuse_open(folder, {number: names[number][0] for number in gone})
    only_gone = any(allocator in name for name, _ in names.values() for allocator in _RESETTING_ALLOCATORS)
    if only_gone and not gone:
        return MappedMemory(0, 0, copied)
    pages_path = folder / f"pages-{_number(decode(pagemap.messages[0]), 1)}.img"
    memory_id = 1 + max(_number(decode(message), 2) for message in files.messages)

    mm = decode(memory_map.messages[0])
    moved: list[_Area] = []
    with pages_path.open("rb") as pages, (folder / MEMORY_FILE).open("xb") as memory:
        os.fchmod(memory.fileno(), 0o400)
        end = 0
        for at, (number, wire, value) in enumerate(mm):
            if number != 14 or not isinstance(value, bytes):
                continue
            area = _Area.decode(value)
            inside = [run for run in runs if run.start < area.end and run.end > area.start]
            is_gone = area.of_file and area.file_id in gone
            is_large = not only_gone and area.can_be_mapped and _pages(area, inside) >= MIN_AREA_PAGES
            if not is_gone and not is_large:
                continue
            if area.of_file:
                _copy_original(names[area.file_id][0], area, memory.fileno(), end)
            _copy_pages(pages.fileno(), inside, area, memory.fileno(), end)
            mm[at] = (number, wire, encode(_as_mapping(area, memory_id, end)))
            moved.append(area)
            end += area.end - area.start + (0 if is_gone else _GAP_BYTES)
        memory.truncate(end)
        mapped = os.fstat(memory.fileno()).st_blocks * 512
    memory_map.messages[0] = encode(mm)
    memory_map.write()
    left = _keep_rest(pagemap, pages_path, runs, moved)
    files.messages.append(_memory_file_entry(memory_id, end, next(iter(names.values()))[1]))
    files.write()
    return MappedMemory(len(moved), mapped, left)


def _runs(pagemap: ImageFile) -> list[_Run]:
    runs, offset = [], 0
    for message in pagemap.messages[1:]:
        fields = decode(message)
        start = _number(fields, 1)
        length = _number(fields, 5, _number(fields, 2)) * PAGE_BYTES
        present = bool(_number(fields, 4) & _PAGE_PRESENT)
        runs.append(_Run(start, start + length, offset, present, fields))
        offset += length if present else 0
    return runs


def _regular_files(files: ImageFile) -> dict[int, tuple[str, Fields]]:
    """File id -> (path, its `reg_file_entry`)."""
    found = {}
    for message in files.messages:
        fields = decode(message)
        regular = _bytes(fields, 3)
        if regular is not None:
            entry = decode(regular)
            found[_number(fields, 2)] = ((_bytes(entry, 6) or b"").decode(errors="surrogateescape"), entry)
    return found


def _below(folder: Path | None, names: dict[int, tuple[str, Fields]]) -> set[int]:
    """Ids of the files in `folder`, which the image knows by their real paths."""
    if folder is None:
        return set()
    start = os.path.realpath(folder) + "/"
    return {number for number, (name, _) in names.items() if name.startswith(start)}


def _refuse_open(folder: Path, gone: dict[int, str]) -> None:
    """Raises `SnapshotError` where the process has one of the files open: only what it maps can be kept."""
    for path in folder.glob("fdinfo-*.img"):
        for fields in map(decode, ImageFile.read(path).messages):
            if _number(fields, 3) == _FILE_IS_REGULAR and _number(fields, 1) in gone:
                raise SnapshotError(
                    "The process keeps a file open that a compiler put into its cache.",
                    why=f"{gone[_number(fields, 1)]} is its descriptor {_number(fields, 4)}.",
                    hint="Close it in `load`, or in `before_snapshot`.",
                    code="not-dumpable",
                )


def _pages(area: _Area, runs: list[_Run]) -> int:
    return sum(min(area.end, r.end) - max(area.start, r.start) for r in runs if r.present) // PAGE_BYTES


def _copy(source: int, target: int, count: int, source_at: int, target_at: int) -> None:
    """Short copies go on, a source that ends early leaves zeros (as a mapping past it would)."""
    while count > 0:
        done = _copy_some(source, target, count, source_at, target_at)
        if done == 0:
            return
        count, source_at, target_at = count - done, source_at + done, target_at + done


def _copy_some(source: int, target: int, count: int, source_at: int, target_at: int) -> int:
    """Inside the kernel where it can: not from a container's own files to a folder mounted into it."""
    try:
        return os.copy_file_range(source, target, count, source_at, target_at)
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return os.pwrite(target, os.pread(source, min(count, _COPY_BYTES), source_at), target_at)


def _copy_original(path: str, area: _Area, memory: int, at: int) -> None:
    """The pages of a mapped file that the process never wrote are not in the image: take them from the file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _copy(fd, memory, area.end - area.start, area.file_offset, at)
    finally:
        os.close(fd)


def _copy_pages(pages: int, runs: list[_Run], area: _Area, memory: int, at: int) -> None:
    for run in runs:
        if run.present:
            start, end = max(area.start, run.start), min(area.end, run.end)
            _copy(pages, memory, end - start, run.offset + start - run.start, at + start - area.start)


def _as_mapping(area: _Area, file_id: int, offset: int) -> Fields:
    return _with(
        area.message,
        {
            3: offset,
            4: file_id,
            6: area.flags & ~(_MAP_ANONYMOUS | _MAP_SHARED) | _MAP_PRIVATE,
            7: area.status & ~(_VMA_ANON_PRIVATE | _VMA_FILE_SHARED | _VMA_HEAP) | _VMA_FILE_PRIVATE,
        },
    )


def _outside(run: _Run, moved: list[_Area]) -> Iterator[tuple[int, int]]:
    """The parts of `run` that no moved area holds; areas are ascending and do not overlap."""
    at = run.start
    for area in moved:
        if area.end <= at or area.start >= run.end:
            continue
        if area.start > at:
            yield at, area.start
        at = min(area.end, run.end)
    if at < run.end:
        yield at, run.end


def _keep_rest(pagemap: ImageFile, pages_path: Path, runs: list[_Run], moved: list[_Area]) -> int:
    """Rewrite pages and page map to what CRIU still has to copy; returns those bytes."""
    rest_path = pages_path.with_suffix(".rest")
    messages, written = [pagemap.messages[0]], 0
    with pages_path.open("rb") as pages, rest_path.open("xb") as rest:
        os.fchmod(rest.fileno(), 0o400)
        for run in runs:
            for start, end in _outside(run, moved):
                count = (end - start) // PAGE_BYTES
                messages.append(encode(_with(run.message, {1: start, 2: count, 5: count})))
                if run.present:
                    _copy(pages.fileno(), rest.fileno(), end - start, run.offset + start - run.start, written)
                    written += end - start
    os.replace(rest_path, pages_path)
    pagemap.messages = messages
    pagemap.write()
    return written


def _memory_file_entry(file_id: int, size: int, like: Fields) -> bytes:
    """A `file_entry` for the memory file; owner and mount fields as in another file of the process."""
    owner = [field for field in like if field[0] == 5]
    regular: Fields = [(1, 0, file_id), (2, 0, _O_LARGEFILE), (3, 0, 0), *owner, (6, 2, MEMORY_NAME.encode())]
    regular += [field for field in like if field[0] == 7]
    regular += [(8, 0, size), (9, 0, 1)]  # 9: external, it comes by descriptor
    return encode([(1, 0, _FILE_IS_REGULAR), (2, 0, file_id), (3, 2, encode(regular))])
