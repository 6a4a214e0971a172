from datetime import datetime, timezone

import click
import pytest

from adapter.cli.period import period


def ns(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()) * 10**9


NOW = ns("2026-03-05 14:30:15") + 123


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        (None, "2026-03-05", None),
        ("today", "2026-03-05", None),
        ("yesterday", "2026-03-04", "2026-03-05"),
        ("month", "2026-03-01", None),
        ("last-month", "2026-02-01", "2026-03-01"),
        ("7d", "2026-02-26 14:30:15", None),
        ("1h30m", "2026-03-05 13:00:15", None),
    ],
)
def test_words(words, start, end):
    chosen = period(words, None, None, NOW)
    fraction = 123 if ":" in start else 0
    assert (chosen.start_ns, chosen.end_ns) == (ns(start) + fraction, NOW if end is None else ns(end))


def test_last_month_in_january_is_of_the_year_before():
    assert period("last-month", None, None, ns("2026-01-31")).start_ns == ns("2025-12-01")


@pytest.mark.parametrize(
    "text",
    ["2026-03-01", "2026-03-01T00:00:00", "2026-03-01T00:00:00Z", "2026-03-01 01:00+01:00", " 2026-03-01T00:00:00z "],
)
def test_instants_are_utc_unless_they_say_otherwise(text):
    chosen = period(None, text, None, NOW)
    assert (chosen.start_ns, chosen.end_ns) == (ns("2026-03-01"), NOW)


def test_a_range_says_its_borders():
    text = str(period(None, "2026-03-01", "2026-03-02", NOW))
    assert text == "2026-03-01T00:00:00Z to 2026-03-02T00:00:00Z (start included, end excluded)"


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        ("tomorrow", None, None),
        ("-5m", None, None),
        ("0s", None, None),
        ("today", "2026-03-01", None),
        ("today", None, "2026-03-01"),
        (None, None, "2026-03-01"),
        (None, "yesterday", None),
        (None, "2026-03-02", "2026-03-02"),
        (None, "2026-03-03", "2026-03-02"),
        (None, "2030-01-01", None),
        (None, "2026-13-01", None),
        ("", None, None),
    ],
)
def test_what_is_no_range_is_refused(words, start, end):
    with pytest.raises(click.UsageError) as caught:
        period(words, start, end, NOW)
    assert caught.value.exit_code == 2


def test_a_range_may_not_begin_before_the_epoch():
    assert period("99999d", None, None, NOW).start_ns == 0
    assert period(None, "0001-01-01", None, NOW).start_ns == 0
