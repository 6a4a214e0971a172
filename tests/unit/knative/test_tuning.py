"""Which autoscaling annotations a Revision should have, case by case."""

from dataclasses import replace

import pytest

from adapter.knative.autoscaling import MIN_SCALE, RETENTION, WINDOW, Defaults
from adapter.knative.tuning import Traffic, read_revision, release, traffic_of, tune
from adapter.policy.activity import Activity
from adapter.policy.keep_alive import Gap, Habits, Wake
from adapter.records import Rung
from tests.fakes.revisions import revision, revision_json

DEFAULTS = Defaults()
S = 10**9


def regular(gap_s, count=30, wake_s=2.0):
    """Called every `gap_s`, and woken by a restore that takes `wake_s`."""
    return Habits(tuple(Gap(gap_s) for _ in range(count)), (Wake(Rung.RESTORE, wake_s),) * 3)


# What it is told of -----------------------------------------------------------------------------


def test_a_revision_that_asks_for_nothing_of_ours_is_not_looked_at():
    value = revision_json()
    del value["metadata"]["annotations"]["gpufn.dev/gpu"]
    assert read_revision(value) is None


@pytest.mark.parametrize(
    "change",
    [{"deletionTimestamp": "2026-01-01T00:00:00Z"}, {"labels": {}}, {"annotations": {"gpufn.dev/gpu": "many"}}],
)
def test_what_goes_or_is_nobodys_or_says_nonsense_is_not_looked_at(change):
    value = revision_json()
    value["metadata"].update(change)
    assert read_revision(value) is None


def test_ours_is_what_our_manager_applied_and_nothing_else():
    found = revision({RETENTION: "5m"}, {WINDOW: "20s"})
    assert found.ours == {WINDOW: "20s"}
    assert found.theirs[RETENTION] == "5m"


def test_what_another_manager_wrote_since_is_theirs():
    found = revision(ours={WINDOW: "20s"}, manager="kubectl-annotate")
    assert found.ours == {}
    assert found.theirs[WINDOW] == "20s"


def test_traffic_is_gaps_between_busy_times_and_the_time_since_the_last_one():
    activity = Activity("embed", "team", ((0, 10 * S), (40 * S, 50 * S)), {Rung.RESTORE: (2.0, 1.0)})
    found = traffic_of(activity, 60 * S)
    assert found.habits.gaps == (Gap(30.0, 20.0),)
    assert [wake.seconds for wake in found.habits.wakes] == [1.0, 2.0]
    assert found.idle_s == 10.0
    assert traffic_of(activity, 45 * S).idle_s == 0.0


def test_of_a_function_that_nobody_called_nothing_is_known():
    assert traffic_of(None, 60 * S) == Traffic()


# What is set ------------------------------------------------------------------------------------


def test_a_function_that_is_called_in_short_gaps_is_kept_over_them():
    found = tune(revision(), Traffic(regular(40.0, wake_s=5.0), 5.0), DEFAULTS)
    assert set(found.annotations) == {WINDOW}
    assert 40 <= int(found.annotations[WINDOW][:-1]) < 60


def test_a_keep_alive_beyond_the_window_is_the_retention_of_the_last_pod():
    found = tune(revision(), Traffic(regular(80.0, wake_s=10.0), 5.0), DEFAULTS)
    assert set(found.annotations) == {RETENTION}
    assert 20 <= int(found.annotations[RETENTION][:-1]) < 60


def test_what_was_found_before_stays_while_it_is_nearly_as_good():
    first = tune(revision(), Traffic(regular(80.0, wake_s=10.0), 5.0), DEFAULTS)
    again = tune(revision(ours=first.annotations), Traffic(regular(82.0, wake_s=10.2), 5.0), DEFAULTS)
    assert again.annotations == first.annotations


def test_before_anything_is_known_knative_does_as_it_does():
    assert tune(revision(), Traffic(), DEFAULTS).annotations == {}


@pytest.mark.parametrize(
    ("theirs", "more"),
    [
        ({RETENTION: "5m"}, {}),
        ({"autoscaling.knative.dev/scaleToZeroPodRetentionPeriod": "5m"}, {}),
        ({MIN_SCALE: "1"}, {}),
        ({"autoscaling.knative.dev/minScale": "2"}, {}),
        ({"autoscaling.knative.dev/class": "hpa.autoscaling.knative.dev"}, {}),
        ({}, {"state": "reserve"}),
    ],
)
def test_what_is_set_by_the_user_or_reached_by_nobody_is_left_alone_and_ours_is_taken_away(theirs, more):
    found = tune(revision(theirs, {WINDOW: "20s"}, **more), Traffic(regular(40.0, wake_s=5.0), 5.0), DEFAULTS)
    assert found.annotations == {}
    assert found.reason


def test_a_window_of_the_users_stays_and_the_retention_makes_up_for_it():
    found = tune(revision({WINDOW: "10s"}), Traffic(regular(40.0, wake_s=5.0), 5.0), DEFAULTS)
    assert set(found.annotations) == {RETENTION}
    assert 30 <= int(found.annotations[RETENTION][:-1]) < 50


def test_a_time_that_the_user_asked_for_is_set_where_no_webhook_has_done_it():
    found = tune(revision({"gpufn.dev/idle": "10m"}), Traffic(), DEFAULTS)
    assert found.annotations == {RETENTION: "540s"}


# What goes beyond what Knative can say ----------------------------------------------------------

LONG = {"gpufn.dev/idle": "3h"}


@pytest.mark.parametrize("derived", [{}, {RETENTION: "3600s"}])
def test_more_than_an_hour_is_held_by_one_replica_at_least(derived):
    found = tune(revision({**LONG, **derived}), Traffic(idle_s=7200.0), DEFAULTS)
    assert found.annotations[MIN_SCALE] == "1"
    assert found.again_s == 3600.0


@pytest.mark.parametrize("idle_s", [3 * 3600.0, None])
def test_it_is_let_go_after_that_and_not_held_before_anybody_called(idle_s):
    assert MIN_SCALE not in tune(revision(LONG), Traffic(idle_s=idle_s), DEFAULTS).annotations


def test_a_least_scale_of_the_users_is_never_changed():
    assert MIN_SCALE not in tune(revision({**LONG, MIN_SCALE: "0"}), Traffic(idle_s=1.0), DEFAULTS).annotations


def test_never_let_go_is_one_replica_at_least():
    assert tune(revision({"gpufn.dev/idle": "0"}), Traffic(), DEFAULTS).annotations == {MIN_SCALE: "1"}


def test_a_caller_who_is_expected_finds_it_warm_and_only_then():
    hourly = Habits(tuple(Gap(3600.0 + n) for n in range(40)), (Wake(Rung.LOAD, 20.0),) * 3)
    early = tune(revision(), Traffic(hourly, 1800.0), DEFAULTS, may_prewarm=True)
    assert MIN_SCALE not in early.annotations
    assert early.again_s is not None
    due = tune(revision(), Traffic(hourly, 1800.0 + early.again_s), DEFAULTS, may_prewarm=True)
    assert due.annotations[MIN_SCALE] == "1"
    assert due.again_s is not None
    over = tune(revision(), Traffic(hourly, 1800.0 + early.again_s + due.again_s), DEFAULTS, may_prewarm=True)
    assert MIN_SCALE not in over.annotations


def test_the_last_free_gpu_is_not_taken_for_who_may_come():
    hourly = Habits(tuple(Gap(3600.0 + n) for n in range(40)), (Wake(Rung.LOAD, 20.0),) * 3)
    assert tune(revision(), Traffic(hourly, 1800.0), DEFAULTS).again_s is None


# Without news -----------------------------------------------------------------------------------


def test_without_news_what_is_set_stays():
    ours = {RETENTION: "33s"}
    assert release(revision(ours=ours), Traffic(), DEFAULTS).annotations == ours


@pytest.mark.parametrize(("idle_s", "held"), [(7200.0, True), (3 * 3600.0, False)])
def test_without_news_a_replica_is_held_for_no_longer_than_was_decided(idle_s, held):
    found = release(revision(LONG, {RETENTION: "3600s", MIN_SCALE: "1"}), Traffic(idle_s=idle_s), DEFAULTS)
    assert (MIN_SCALE in found.annotations) is held
    assert found.annotations[RETENTION] == "3600s"


def test_without_news_nothing_begins_to_be_held():
    assert MIN_SCALE not in release(revision(LONG), Traffic(idle_s=1.0), DEFAULTS).annotations


def test_without_news_a_revision_that_nobody_reaches_any_more_is_let_go():
    assert release(revision(ours={MIN_SCALE: "1"}, state="reserve"), Traffic(), DEFAULTS).annotations == {}


def test_a_cluster_whose_window_is_another_is_counted_with():
    found = tune(revision({"gpufn.dev/idle": "10m"}), Traffic(), replace(DEFAULTS, window_s=120))
    assert found.annotations == {RETENTION: "480s"}
