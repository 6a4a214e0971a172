"""Which rights a dumped process keeps, and whom a restore is refused."""

import struct

import pytest

from adapter.errors import SnapshotError
from adapter.snapshot.image import ImageFile, decode, encode
from adapter.snapshot.rights import give_up, why_no_restore

MAGIC = b"core-img"
CHOWN, PTRACE, CHECKPOINT_RESTORE = 1 << 0, 1 << 19, 1 << 40


def core(permitted: int, bounding: int = 0) -> bytes:
    """A core image of one thread, as CRIU writes it: capabilities are two words of 32 bits each."""

    def words(number: int, mask: int):
        return [(number, 0, mask & 0xFFFFFFFF), (number, 0, mask >> 32)]

    creds = [
        (1, 0, 1000),
        *words(9, 0),
        *words(10, permitted),
        *words(11, permitted),
        *words(12, bounding),
        *words(19, 0),
    ]
    thread = [(1, 0, 7), (10, 2, encode(creds)), (13, 2, b"python")]
    message = encode([(1, 0, 1), (5, 2, encode(thread))])
    return MAGIC + struct.pack("<I", len(message)) + message


def capabilities(path, number: int) -> list[int]:
    thread = next(value for field, _, value in decode(ImageFile.read(path).messages[0]) if field == 5)
    creds = next(value for field, _, value in decode(thread) if field == 10)
    return [value for field, _, value in decode(creds) if field == number]


def test_criu_s_rights_go_and_the_function_s_stay(tmp_path):
    for pid in (5001, 5003):
        (tmp_path / f"core-{pid}.img").write_bytes(core(CHOWN | PTRACE | CHECKPOINT_RESTORE))
    assert give_up(tmp_path) == CHOWN
    for pid in (5001, 5003):
        path = tmp_path / f"core-{pid}.img"
        assert capabilities(path, 10) == capabilities(path, 11) == [CHOWN, 0]
        assert capabilities(path, 12) == [0xFFFFFFFF, 0xFFFFFFFF]
        assert capabilities(path, 1) == [1000]


def test_an_image_that_is_none_is_refused(tmp_path):
    (tmp_path / "core-1.img").write_bytes(core(0)[:-3])
    with pytest.raises(SnapshotError, match="truncated"):
        give_up(tmp_path)


@pytest.mark.parametrize(
    ("needed", "permitted", "bounding", "why"),
    [
        (0, 0, CHECKPOINT_RESTORE, ""),
        (0, 0, 1 << 21, ""),
        (0, 0, CHOWN, "CHECKPOINT_RESTORE is not given"),
        (CHOWN, CHOWN, CHECKPOINT_RESTORE, ""),
        (CHOWN | PTRACE, PTRACE, CHECKPOINT_RESTORE, "(0x1)"),
    ],
)
def test_a_restore_that_could_only_hang_is_not_tried(needed, permitted, bounding, why):
    said = why_no_restore(needed, f"Name:\tpython\nCapPrm:\t{permitted:016x}\nCapBnd:\t{bounding:016x}\n")
    assert why in said
    assert bool(said) is bool(why)
