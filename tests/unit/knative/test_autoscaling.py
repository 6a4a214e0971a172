"""Knative's settings and annotations, as Knative reads them."""

import pytest

from adapter.knative.autoscaling import (
    MAX_SCALE,
    MIN_SCALE,
    RETENTION,
    WINDOW,
    Defaults,
    keep_alive,
    kept_s,
    reach_s,
    said,
    scale_said,
)


def test_where_the_cluster_says_nothing_knatives_own_defaults_count():
    assert Defaults.read({"_example": "stable-window: 90s"}, {}) == Defaults()


def test_what_the_cluster_says_counts():
    autoscaler = {
        "stable-window": "90s",
        "scale-to-zero-pod-retention-period": "2m",
        "min-scale": "1",
        "allow-zero-initial-scale": "true",
    }
    assert Defaults.read(autoscaler, {"max-revision-timeout-seconds": "1200"}) == Defaults(90, 120, 1, True, 1200)


@pytest.mark.parametrize("nonsense", ["", "soon", "-5s", "1e9"])
def test_what_cannot_be_used_counts_as_not_said(nonsense):
    data = {"stable-window": nonsense, "min-scale": nonsense}
    assert Defaults.read(data, {"max-revision-timeout-seconds": nonsense}) == Defaults()


def test_knatives_older_names_are_read_too_and_the_newer_one_wins():
    older = {"autoscaling.knative.dev/minScale": "2"}
    assert said(older, MIN_SCALE) == "2"
    assert said({**older, MIN_SCALE: "3"}, MIN_SCALE) == "3"


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5"])
def test_a_scale_that_knative_itself_refuses_is_not_said(text):
    assert scale_said({MAX_SCALE: text}, MAX_SCALE) is None


def test_a_retention_that_the_cluster_has_anyway_is_not_written_and_another_one_is_taken_back():
    defaults = Defaults(retention_s=60)
    assert keep_alive(120, defaults, {}) == {}
    assert keep_alive(60, defaults, {}) == {RETENTION: "0s"}


@pytest.mark.parametrize("nonsense", ["", "soon", "0s", "100h"])
def test_a_window_that_makes_no_sense_breaks_nothing(nonsense):
    theirs = {WINDOW: nonsense, RETENTION: nonsense}
    assert kept_s(Defaults(), theirs) >= 6
    assert 3606 <= reach_s(Defaults(), theirs) <= 7200
    assert keep_alive(30, Defaults(), {WINDOW: nonsense}).keys() <= {RETENTION}
