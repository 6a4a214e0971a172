"""However parts of a file lie, each byte of them is read and copied once, in reads that any disk accepts."""

from hypothesis import given, strategies as st

from adapter.gpu.reads import GAP_BYTES, PAGE_BYTES, plan

LIMITS = st.integers(1, 8).map(lambda pages: pages * PAGE_BYTES)


@st.composite
def apart(draw):
    """Parts of a file that do not overlap, each with a device address of its own, in any order."""
    at, ranges = draw(st.integers(0, 3 * PAGE_BYTES)), []
    for _ in range(draw(st.integers(0, 8))):
        size = draw(st.integers(0, 5 * PAGE_BYTES))
        ranges.append((at, size))
        at += size + draw(st.sampled_from([0, 0, 1, 63, PAGE_BYTES, GAP_BYTES, GAP_BYTES + 1, 5 * GAP_BYTES]))
    shift = draw(st.sampled_from([10**9, 10**9 + 7]))
    with_addresses = [(start, size, shift + 2 * start) for start, size in ranges]  # only neighbours of none touch
    return draw(st.permutations(with_addresses))


def joined(parts) -> list[tuple[int, int, int]]:
    """(address, file offset, bytes) in order, neighbours on both sides made one; what comes twice stays apart."""
    result: list[tuple[int, int, int]] = []
    for address, at, size in sorted(parts):
        last = result[-1] if result else (0, 0, 0)
        if size and result and (last[0] + last[2], last[1] + last[2]) == (address, at):
            result[-1] = (last[0], last[1], last[2] + size)
        elif size:
            result.append((address, at, size))
    return result


@given(apart(), LIMITS)
def test_every_byte_is_copied_once_to_its_place(ranges, limit):
    copied = [
        (address, read.start + start, size) for read in plan(ranges, limit) for start, size, address in read.copies
    ]
    assert joined(copied) == joined((address, at, size) for at, size, address in ranges)


@given(apart(), LIMITS)
def test_reads_begin_at_pages_fit_their_buffer_and_do_not_overlap_but_in_a_page(ranges, limit):
    reached = 0
    for read in plan(ranges, limit):
        assert read.start % PAGE_BYTES == 0
        assert read.start + PAGE_BYTES > reached
        padded = -(-read.size // PAGE_BYTES) * PAGE_BYTES
        assert 0 < padded <= limit
        assert all(start >= 0 and start + size <= read.size for start, size, _ in read.copies)
        reached = read.start + read.size


@given(apart(), LIMITS)
def test_nothing_is_read_for_nothing_beyond_small_gaps(ranges, limit):
    for read in plan(ranges, limit):
        useful = sorted((start, size) for start, size, _ in read.copies)
        ends = [PAGE_BYTES, *(start + size for start, size in useful)]
        assert all(start - end <= GAP_BYTES for (start, _), end in zip(useful, ends, strict=False))


@given(st.integers(0, 40 * PAGE_BYTES), st.integers(1, 40 * PAGE_BYTES), LIMITS)
def test_neighbours_in_the_file_and_on_the_device_are_one_copy(at, size, limit):
    half = size // 2
    whole, halves = plan([(at, size, 7)], limit), plan([(at, half, 7), (at + half, size - half, 7 + half)], limit)
    assert whole == halves
    assert all(len(read.copies) == 1 for read in whole)
