"""Compile caches: what comes back, what is left out, and bundles that are refused."""

import io
import os
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings, strategies as st

from adapter.errors import SnapshotCorrupt
from adapter.snapshot.compile_caches import BUNDLE, pack, unpack, variables

FILES = {
    "inductor/ab/kernel.so": b"\x7fELF",
    "inductor/fxgraph/p6/x": b"graph",
    "triton/T/k.cubin": b"c",
    "cuda/0/0": b"",
}


def write(folder, files, mtime_ns=1_700_000_000_123_456_789):
    for number, (name, data) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(mtime_ns + number, mtime_ns + number))


def read(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_variables_of_all_compilers_point_into_the_folder(tmp_path):
    assert set(variables(tmp_path)) == {
        *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"),
        *("ORT_TENSORRT_CACHE_PATH", "GPUFN_ENGINE_CACHE"),
    }
    assert all(value.startswith(f"{tmp_path}/") for value in variables(tmp_path).values())


def test_files_come_back_with_their_times(tmp_path):
    write(tmp_path / "live", FILES)
    packed = pack(tmp_path / "live", tmp_path / BUNDLE)
    assert (packed.files, packed.left_out) == (4, 0)
    unpack(tmp_path / BUNDLE, tmp_path / "back")
    assert read(tmp_path / "back") == read(tmp_path / "live")
    assert (tmp_path / "back").stat().st_mode & 0o077 == 0


def test_no_bundle_of_nothing(tmp_path):
    (tmp_path / "inductor").mkdir()
    assert pack(tmp_path, tmp_path / BUNDLE).files == 0
    assert not (tmp_path / BUNDLE).exists()


def test_links_pipes_and_files_of_others_stay_behind(tmp_path):
    live = tmp_path / "live"
    write(live, {"inductor/real": b"1", "elsewhere/file": b"2"})
    (live / "inductor" / "link").symlink_to("/etc/passwd")
    os.mkfifo(live / "inductor" / "pipe")
    pack(live, tmp_path / BUNDLE)
    unpack(tmp_path / BUNDLE, tmp_path / "back")
    assert list(read(tmp_path / "back")) == ["inductor/real"]


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12), limit=st.integers(0, 200))
def test_a_bundle_stays_below_its_limit_and_prefers_new_files(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("caches")
    write(folder, {f"triton/{number:02}": b"x" * size for number, size in enumerate(sizes)})
    packed = pack(folder, folder / BUNDLE, limit)
    assert packed.bytes <= limit
    assert packed.files + packed.left_out == len(sizes)
    if packed.left_out:
        kept = {f"triton/{number:02}" for number in range(len(sizes))} - _left_out(folder)
        oldest_first = [f"triton/{number:02}" for number in range(len(sizes))]
        newest_left_out = max(name for name in oldest_first if name not in kept)
        newer = sum(sizes[int(name[-2:])] for name in kept if name > newest_left_out)
        assert newer + sizes[int(newest_left_out[-2:])] > limit  # only what did not fit beside newer ones


def _left_out(folder):
    names = set()
    if (folder / BUNDLE).exists():
        with tarfile.open(folder / BUNDLE) as archive:
            names = set(archive.getnames())
    return {f"triton/{path.name}" for path in (folder / "triton").iterdir()} - names


def member(name, kind=tarfile.REGTYPE, *, size=0, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    info.pax_headers = {"GPUFN.mtime_ns": "5"}
    return info


@pytest.mark.parametrize(
    "info",
    [
        member("../inductor/x"),
        member("/inductor/x"),
        member("inductor/../../x"),
        member("inductor"),
        member("other/x"),
        member("inductor//x"),
        member("inductor/x", tarfile.SYMTYPE, target="/etc/passwd"),
        member("inductor/x", tarfile.LNKTYPE, target="inductor/y"),
        member("inductor/x", tarfile.FIFOTYPE),
        member("inductor/x", tarfile.CHRTYPE),
        member("inductor/x", tarfile.DIRTYPE),
        member("inductor/x", size=200),
    ],
    ids=lambda info: f"{info.name} {info.type!r} {info.size}",
)
def test_members_that_are_no_cache_files_are_refused(tmp_path, info):
    with tarfile.open(tmp_path / BUNDLE, "w") as archive:
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(SnapshotCorrupt):
        unpack(tmp_path / BUNDLE, tmp_path / "back", 100)
    assert not (tmp_path / "x").exists()
    assert read(tmp_path / "back") == {}


@pytest.mark.parametrize("harm", ["twice", "without time", "bad time", "truncated", "not a tar", "compressed"])
def test_damaged_bundles_are_refused(tmp_path, harm):
    write(tmp_path / "live", {"cuda/a": b"x" * 2000})
    pack(tmp_path / "live", tmp_path / BUNDLE)
    path = tmp_path / BUNDLE
    data = path.read_bytes()
    path.unlink()
    match harm:
        case "twice" | "without time" | "bad time":
            info = member("cuda/a")
            info.pax_headers = {} if harm == "without time" else {"GPUFN.mtime_ns": "no" if harm == "bad time" else "5"}
            with tarfile.open(path, "w") as archive:
                archive.addfile(info, io.BytesIO())
                archive.addfile(info, io.BytesIO())
        case "truncated":
            path.write_bytes(data[:1600])
        case "not a tar":
            path.write_bytes(b"no" * 1000)
        case "compressed":
            with tarfile.open(path, "w:gz") as archive:
                archive.addfile(member("cuda/a"), io.BytesIO())
    with pytest.raises(SnapshotCorrupt):
        unpack(path, tmp_path / "back")


def test_a_size_below_zero_is_refused(tmp_path):
    """It would lead the reader back to the same header again and again."""
    info = member("inductor/a")
    info.pax_headers = {**info.pax_headers, "size": "-1536"}
    (tmp_path / BUNDLE).write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(2 * tarfile.BLOCKSIZE))
    with pytest.raises(SnapshotCorrupt):
        unpack(tmp_path / BUNDLE, tmp_path / "back")
    assert read(tmp_path / "back") == {}


def test_a_file_is_never_in_memory_as_a_whole(tmp_path):
    with tarfile.open(tmp_path / BUNDLE, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member("inductor/a", size=64 << 20), io.BytesIO(bytes(64 << 20)))
    tracemalloc.start()
    try:
        unpack(tmp_path / BUNDLE, tmp_path / "back")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "back" / "inductor" / "a").stat().st_size == 64 << 20
    assert most < 16 << 20
