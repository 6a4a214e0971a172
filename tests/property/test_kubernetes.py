"""A spec as annotations of a pod, which a webhook reads again."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given, strategies as st

from adapter.errors import ConfigError
from adapter.hosts.kubernetes_pods import annotations_of
from adapter.spec import parse_spec

WORDS = st.lists(st.text("abcdefgh-0123456789", min_size=1, max_size=8), max_size=3)
CONFIG = st.fixed_dictionaries(
    {},
    optional={
        "gpu": st.fixed_dictionaries(
            {},
            optional={
                "count": st.sampled_from([0, 0.25, 0.5, 1, 2, 8]),
                "models": WORDS,
                "memory": st.integers(0, 2**45),
                "mig": st.sampled_from(["1g.5gb", "3g.20gb", "1g.10gb+me"]),
                "compute": st.sampled_from(["any", "8.0", "9.0"]),
                "spot": st.sampled_from(["any", "prefer", "require"]),
            },
        ),
        "scale": st.fixed_dictionaries(
            {},
            optional={
                "min": st.integers(0, 3),
                "max": st.integers(1, 1000),
                "park": st.integers(0, 1000),
                "idle": st.one_of(st.just("auto"), st.floats(0, 86400).map(lambda s: round(s, 6))),
                "in_flight": st.integers(1, 1000),
                "cold_price": st.floats(0, 1000).map(lambda p: round(p, 6)),
            },
        ),
        "limits": st.fixed_dictionaries(
            {}, optional={"exec_timeout": st.integers(0, 3600), "body": st.integers(0, 2**40)}
        ),
        "snapshot": st.fixed_dictionaries(
            {}, optional={"process": st.sampled_from(["auto", "on", "off"]), "env": WORDS}
        ),
        "function": st.fixed_dictionaries({}, optional={"tenant": st.text("abc", min_size=1)}),
    },
)


@given(CONFIG)
def test_what_a_pods_annotations_say_is_the_spec_that_they_were_made_of(config):
    try:
        spec = parse_spec(config, {})
    except ConfigError:
        assume(False)
    read = parse_spec({}, annotations_of(spec))
    assert replace(read, park_after_s=spec.park_after_s) == spec
