import pytest

from adapter.units import format_duration, format_size, parse_duration_s, parse_size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("30s", 30), ("250ms", 0.25), ("1h15m", 4500), ("1h30m5s", 5405), ("1.5h", 5400), ("0", 0), (" 5m ", 300),
     ("10us", 1e-5), ("10µs", 1e-5), ("7ns", 7e-9), ("2.5", 2.5)],
)  # fmt: skip
def test_durations_as_go_and_watchdog_write_them(text, seconds):
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5 m", "-5s", "1d", "5m!", "1h 5m", "1e3", "inf", "nan", "٣s"])
def test_wrong_durations_say_the_accepted_form(text):
    with pytest.raises(ValueError, match="a duration like 30s"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("16Gi", 16 * 2**30), ("500M", 500_000_000), ("1.5Ki", 1536), ("2k", 2000), ("3TiB", 3 * 2**40)],
)
def test_sizes_as_kubernetes_writes_them(text, size):
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "Gi", "-1", "16 Gi", "16gi", "1e6", "0x10"])
def test_wrong_sizes_say_the_accepted_form(text):
    with pytest.raises(ValueError, match="a size like 512Mi"):
        parse_size_bytes(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.085, "85ms"), (0.9994, "999ms"), (0.9996, "1.00s"), (1.239, "1.24s"), (59.996, "1m00s"),
     (200, "3m20s"), (7500, "2h05m"), (-0.5, "-500ms"), (3599.7, "1h00m")],
)  # fmt: skip
def test_durations_for_people(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (812, "812B"), (1023, "1023B"), (4096, "4.0Ki"), (1023.99 * 1024, "1.0Mi"), (3.1 * 2**30, "3.1Gi"), (5 * 2**40, "5120.0Gi")],
)  # fmt: skip
def test_sizes_for_people(size, text):
    assert format_size(int(size)) == text
