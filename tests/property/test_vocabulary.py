"""Units, specs, settings and records over everything they may be given."""

import contextlib
import math
from dataclasses import fields

from hypothesis import given, strategies as st

from adapter.errors import ConfigError
from adapter.records import Event, EventName, Phase, PhaseName, Rung, SkippedRung, StartRecord
from adapter.replica import ReplicaSettings
from adapter.spec import FIELDS, MAX_DURATION_S, MAX_REPLICAS, parse_spec
from adapter.units import format_duration, format_size, parse_duration_s, parse_size_bytes

WORD = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NS = st.integers(0, 2**62)
SECONDS = st.floats(0, MAX_DURATION_S).map(lambda value: round(value, 6))

TOML = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
"""Whatever a TOML file can hold."""


@given(st.integers(0, 10**18 - 1))
def test_whole_sizes_are_exact(size):
    assert parse_size_bytes(str(size)) == size


@given(st.text(max_size=30) | st.from_regex(r"[0-9.]{0,30}(ns|us|ms|s|m|h|Ki|M|B){0,3}", fullmatch=True))
def test_any_text_is_a_finite_number_or_refused(text):
    for parse in (parse_duration_s, parse_size_bytes):
        with contextlib.suppress(ValueError):
            assert 0 <= parse(text) < math.inf


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_parts_of_a_duration_add_up(hours, minutes, seconds, millis):
    total = hours * 3600 + minutes * 60 + seconds + millis / 1000
    assert math.isclose(parse_duration_s(f"{hours}h{minutes}m{seconds}s{millis}ms"), total, abs_tol=1e-9)


@given(st.floats(0, 1e6))
def test_a_printed_duration_reads_back_within_its_last_digit(seconds):
    precision = 0.0006 if seconds < 1 else 0.006 if seconds < 60 else 0.6 if seconds < 3600 else 60
    assert abs(parse_duration_s(format_duration(seconds)) - seconds) <= precision


@given(st.integers(0, 2**50))
def test_a_printed_size_reads_back_within_its_last_digit(size):
    assert abs(parse_size_bytes(format_size(size)) - size) <= max(1, size * 0.051)


@given(
    st.dictionaries(st.sampled_from(sorted({item.table for item in FIELDS})) | st.text(max_size=8), TOML, max_size=3)
)
def test_any_file_gives_a_spec_or_a_configuration_error(file):
    with contextlib.suppress(ConfigError):
        parse_spec(file, {})


@given(st.sampled_from(FIELDS), TOML)
def test_any_value_of_a_known_key_is_used_or_refused_by_name(item, value):
    try:
        parse_spec({item.table: {item.key: value}}, {})
    except ConfigError as error:
        assert f"{item.table}.{item.key}" in error.message or "above" in error.message


@given(st.sampled_from([item for item in FIELDS if not item.is_built_in]), TEXT)
def test_an_annotation_and_the_same_text_in_the_file_agree(item, text):
    outcomes = []
    for file, annotations in (({item.table: {item.key: text}}, {}), ({}, {f"gpufn.dev/{item.annotation}": text})):
        try:
            outcomes.append(parse_spec(file, annotations))
        except ConfigError as error:
            outcomes.append(error.code)
    assert outcomes[0] == outcomes[1]


@given(low=st.integers(0, MAX_REPLICAS), high=st.integers(1, MAX_REPLICAS), initial=st.integers(0, MAX_REPLICAS))
def test_replica_bounds_hold(low, high, initial):
    file = {"scale": {"min": low, "max": high, "initial": initial}}
    try:
        spec = parse_spec(file, {})
    except ConfigError:
        assert low > high
        return
    assert spec.min_replicas <= spec.max_replicas
    assert spec.initial_replicas <= spec.max_replicas
    assert spec.in_flight >= 1


def _setting(item):
    """A strategy for values of one field of `ReplicaSettings`, by its type."""
    default = item.default
    if item.name in ("process_snapshot", "weight_snapshot", "verify_weights"):
        return st.sampled_from(["auto", "on", "off"])
    if item.name == "resume":
        return st.sampled_from(["held", "asked"])
    if item.name == "snapshot_by":
        return st.sampled_from(["replica", "host"])
    if item.name == "port":
        return st.integers(0, 65535)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(1, 10**15)
    if isinstance(default, float):
        return SECONDS
    return st.lists(WORD, max_size=3).map(tuple) if isinstance(default, tuple) else TEXT


SETTINGS = st.fixed_dictionaries({item.name: _setting(item) for item in fields(ReplicaSettings)})


@given(SETTINGS)
def test_settings_travel_through_the_environment(values):
    settings = ReplicaSettings(**values)
    assert ReplicaSettings.from_env(settings.to_env()) == settings


@given(st.dictionaries(st.sampled_from(sorted(ReplicaSettings().to_env())), TEXT, max_size=4))
def test_any_environment_gives_settings_or_a_configuration_error(environ):
    with contextlib.suppress(ConfigError):
        ReplicaSettings.from_env(environ)


PHASES = st.builds(
    lambda name, start, length: Phase(name, start, start + length),
    st.sampled_from(PhaseName), st.integers(0, 10**12), st.integers(0, 10**12),
)  # fmt: skip
RECORDS = st.builds(
    StartRecord, function=TEXT, namespace=TEXT, revision=TEXT, replica=TEXT, rung=st.sampled_from(Rung), started_at_ns=NS,
    total_ns=NS, phases=st.lists(PHASES, max_size=6).map(tuple), held_requests=st.integers(0, 10**6), error=TEXT,
    skipped=st.lists(st.builds(SkippedRung, st.sampled_from(Rung), WORD, TEXT), max_size=3).map(tuple),
)  # fmt: skip


@given(RECORDS)
def test_start_records_travel_as_json(record):
    assert StartRecord.from_json(record.to_json()) == record


@given(RECORDS)
def test_covered_ratio_is_a_ratio_where_phases_are_inside(record):
    end = max((phase.end_ns for phase in record.phases), default=0)
    whole = StartRecord(**{**{f.name: getattr(record, f.name) for f in fields(record)}, "total_ns": end})
    assert 0 <= whole.covered_ratio <= 1


@given(RECORDS, st.integers(0, 10**12))
def test_host_time_moves_the_start_and_never_the_end(record, lead):
    seen = record.with_host_time(record.started_at_ns - lead)
    assert seen.started_at_ns + seen.total_ns == record.started_at_ns + record.total_ns
    assert seen.phases[0].end_ns == lead


@given(TOML)
def test_any_json_is_a_record_or_refused(data):
    with contextlib.suppress(ValueError):
        StartRecord.from_json(data)


@given(
    st.sampled_from(EventName),
    NS,
    st.dictionaries(WORD.filter(lambda w: w not in ("event", "at_ns")), TEXT | NS, max_size=4),
)
def test_events_travel_as_lines(name, at_ns, values):
    event = Event(name, at_ns, values)
    assert Event.from_line(event.to_line()) == event


@given(st.binary(max_size=60))
def test_any_bytes_are_an_event_or_refused(line):
    with contextlib.suppress(ValueError):
        Event.from_line(line)
