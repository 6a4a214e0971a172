"""What a Knative Service becomes on its way in: what we derive follows what its user wrote, and nothing else changes."""

import copy
import json

import jsonpatch
import pytest

from adapter.errors import ConfigError
from adapter.keys import DERIVED_ANNOTATION
from adapter.knative.autoscaling import Defaults
from adapter.knative.service_patch import patch_service

MAX, MIN = "autoscaling.knative.dev/max-scale", "autoscaling.knative.dev/min-scale"
WINDOW, RETENTION = "autoscaling.knative.dev/window", "autoscaling.knative.dev/scale-to-zero-pod-retention-period"
DEADLINE = "serving.knative.dev/progress-deadline"


def service(on_service=None, on_template=None, *, name=None, limits=None, **spec):
    """Annotations of ours are given by their name after the slash."""

    def annotations(given):
        return {f"gpufn.dev/{key}" if "/" not in key else key: text for key, text in (given or {}).items()}

    container = {"image": "registry.example/embed", "resources": {"limits": limits} if limits else {}}
    metadata = {"annotations": annotations(on_template), **({"name": name} if name else {})}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "embed", "namespace": "team", "annotations": annotations(on_service)},
        "spec": {"template": {"metadata": metadata, "spec": {"containers": [container], **spec}}},
    }


def admit(new, old=None, defaults=None):
    return patch_service(new, old, namespace="team", namespace_labels={}, defaults=defaults or Defaults())


def admitted(new, old=None, defaults=None):
    return jsonpatch.apply_patch(new, list(admit(new, old, defaults).operations))


def template_annotations(found):
    return found["spec"]["template"]["metadata"]["annotations"]


def template_spec(found):
    return found["spec"]["template"]["spec"]


# What is derived --------------------------------------------------------------------------------


def test_annotations_of_the_service_come_down_to_its_template_which_wins():
    found = template_annotations(admitted(service({"queue": "5", "in-flight": "3"}, {"queue": "9"})))
    assert found["gpufn.dev/in-flight"] == "3"
    assert found["gpufn.dev/queue"] == "9"


def test_scale_becomes_knatives_scale():
    found = template_annotations(admitted(service({"max": "4", "min": "1", "initial": "2"})))
    assert (found[MAX], found[MIN], found["autoscaling.knative.dev/initial-scale"]) == ("4", "1", "2")


def test_nothing_is_said_that_was_not_asked():
    found = template_annotations(admitted(service({"gpu": "1"})))
    assert not any(key.startswith("autoscaling.knative.dev/") for key in found)
    assert "containerConcurrency" not in template_spec(admitted(service({"gpu": "1"})))


def test_a_gpu_shows_in_the_limits():
    container = template_spec(admitted(service({"gpu": "2"})))["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}


@pytest.mark.parametrize("asked", [{"gpu": "0.5"}, {"mig": "1g.5gb"}])
def test_a_part_of_a_gpu_has_a_name_that_only_its_node_knows(asked):
    assert template_spec(admitted(service(asked)))["containers"][0]["resources"] == {}


def test_requests_at_once_are_knatives_concurrency():
    assert template_spec(admitted(service({"in-flight": "3"})))["containerConcurrency"] == 3


def test_whoever_waits_for_a_start_may_wait_for_the_answer_too():
    spec = template_spec(admitted(service({"start-timeout": "4m", "exec-timeout": "2m"})))
    assert (spec["timeoutSeconds"], spec["responseStartTimeoutSeconds"]) == (360, 360)


def test_a_gpu_limit_alone_is_enough_to_be_waited_for():
    spec = template_spec(admitted(service(limits={"nvidia.com/gpu": "1"})))
    assert spec["timeoutSeconds"] == 360


def test_no_timeout_goes_beyond_what_the_cluster_allows_and_the_warning_says_what_to_raise():
    answer = admit(service({"start-timeout": "20m"}))
    found = jsonpatch.apply_patch(service({"start-timeout": "20m"}), list(answer.operations))
    assert template_spec(found)["timeoutSeconds"] == 600
    assert any("max-revision-timeout-seconds" in warning for warning in answer.warnings)


@pytest.mark.parametrize(("start", "deadline"), [("5m", None), ("20m", "1500s")])
def test_a_long_start_has_a_later_deadline(start, deadline):
    assert template_annotations(admitted(service({"start-timeout": start}))).get(DEADLINE) == deadline


@pytest.mark.parametrize(
    ("idle", "window", "retention"),
    [("30s", "30s", None), ("1s", "6s", None), ("60s", None, None), ("10m", None, "540s"), ("2h", None, "3600s")],
)
def test_an_idle_time_is_window_and_retention(idle, window, retention):
    found = template_annotations(admitted(service({"idle": idle})))
    assert (found.get(WINDOW), found.get(RETENTION)) == (window, retention)


def test_never_stopped_is_one_at_least():
    assert template_annotations(admitted(service({"idle": "0"})))[MIN] == "1"


def test_an_idle_time_that_is_learned_is_left_to_the_tuner():
    found = template_annotations(admitted(service({"idle": "auto", "gpu": "1"})))
    assert not {WINDOW, RETENTION, MIN} & found.keys()


@pytest.mark.parametrize(("allows", "said"), [(True, "0"), (False, None)])
def test_nothing_is_started_first_only_where_the_cluster_allows_it(allows, said):
    answer = admit(service({"initial": "0"}), defaults=Defaults(allows_initial_zero=allows))
    found = jsonpatch.apply_patch(service({"initial": "0"}), list(answer.operations))
    assert template_annotations(found).get("autoscaling.knative.dev/initial-scale") == said
    assert bool(answer.warnings) is not allows


# Whose Service it is ----------------------------------------------------------------------------


def test_a_service_that_asks_for_nothing_of_ours_is_not_touched():
    assert admit(service({"example.com/a": "b"}, limits={"cpu": "1"})).operations == ()


@pytest.mark.parametrize(
    ("ours", "theirs", "spec"),
    [
        ({"max": "3"}, {MAX: "7"}, {}),
        ({"max": "3"}, {"autoscaling.knative.dev/maxScale": "7"}, {}),
        ({"idle": "10m"}, {RETENTION: "5m"}, {}),
        ({"start-timeout": "20m"}, {DEADLINE: "30m"}, {}),
        ({"in-flight": "3"}, {}, {"containerConcurrency": 0}),
        ({"exec-timeout": "5m"}, {}, {"timeoutSeconds": 30}),
    ],
)
def test_what_the_user_set_stays(ours, theirs, spec):
    before = service(ours, theirs, **spec)
    after = admitted(before)
    assert template_annotations(after).items() >= theirs.items()
    assert template_spec(after).items() >= spec.items()
    assert "autoscaling.knative.dev/max-scale" not in template_annotations(after).keys() - theirs.keys()


def test_a_gpu_limit_of_the_users_wins_and_it_is_said():
    answer = admit(service({"gpu": "2"}, limits={"nvidia.com/gpu": "1"}))
    assert not any("limits" in operation["path"] for operation in answer.operations)
    assert any("no effect" in warning for warning in answer.warnings)


@pytest.mark.parametrize(
    "before",
    [
        service({"min": "3", "max": "9"}, {MAX: "2"}),
        service({"max": "2"}, {MIN: "3"}),
        service({"start-timeout": "10m"}, {DEADLINE: "60s"}),
        service({"min": "3", "max": "2"}),
        service({"maxx": "2"}),
        service({"tenant": "another"}),
    ],
)
def test_what_contradicts_itself_or_is_unknown_is_refused_with_what_to_do(before):
    with pytest.raises(ConfigError) as refused:
        admit(before)
    assert refused.value.hint


# Again and again --------------------------------------------------------------------------------

ASKS = [
    {"gpu": "1", "max": "3", "in-flight": "2", "start-timeout": "10m"},
    {"idle": "10m", "min": "0"},
    {"idle": "0", "gpu": "0.5"},
]


@pytest.mark.parametrize("asked", ASKS)
def test_what_was_admitted_is_admitted_unchanged(asked):
    once = admitted(service(asked))
    assert admit(once).operations == ()
    assert admit(once, once).operations == ()


@pytest.mark.parametrize("asked", ASKS)
def test_an_update_of_something_else_makes_no_new_template_whatever_the_cluster_says_now(asked):
    before = admitted(service(asked))
    after = copy.deepcopy(before)
    after["metadata"]["labels"] = {"a": "b"}
    changed = Defaults(window_s=90, longest_timeout_s=1200, allows_initial_zero=True)
    assert admit(after, before, changed).operations == ()


def test_a_service_from_before_us_gets_no_new_revision_by_an_update_of_something_else():
    before = service({"gpu": "1"})
    after = copy.deepcopy(before)
    after["metadata"]["labels"] = {"a": "b"}
    assert admit(after, before).operations == ()


def test_an_annotation_that_changes_takes_along_what_came_of_it():
    before = admitted(service({"max": "2"}))
    after = copy.deepcopy(before)
    after["metadata"]["annotations"]["gpufn.dev/max"] = "5"
    found = template_annotations(admitted(after, before))
    assert (found["gpufn.dev/max"], found[MAX]) == ("5", "5")


def test_an_annotation_that_goes_takes_along_what_came_of_it():
    clean = service({"queue": "4"})
    before = admitted(service({"queue": "4", "max": "2", "gpu": "1"}))
    after = copy.deepcopy(before)
    del after["metadata"]["annotations"]["gpufn.dev/max"], after["metadata"]["annotations"]["gpufn.dev/gpu"]
    assert any("gpufn.dev/max is no longer" in warning for warning in admit(after, before).warnings)
    found = admitted(after, before)
    assert template_annotations(found) == template_annotations(admitted(clean))
    assert template_spec(found)["containers"][0]["resources"]["limits"] == {}


def test_a_service_that_asks_for_nothing_any_more_is_as_its_user_wrote_it():
    before = admitted(service({"max": "2", "exec-timeout": "9m"}))
    after = copy.deepcopy(before)
    after["metadata"]["annotations"] = {
        key: text for key, text in after["metadata"]["annotations"].items() if key == DERIVED_ANNOTATION
    }
    found = admitted(after, before)
    assert template_annotations(found) == {}
    assert template_spec(found) == template_spec(service())
    assert DERIVED_ANNOTATION not in found["metadata"]["annotations"]


def test_what_the_user_then_sets_over_ours_is_the_users():
    before = admitted(service({"max": "2"}))
    theirs = copy.deepcopy(before)
    template_annotations(theirs)[MAX] = "8"
    after = admitted(theirs, before)
    assert template_annotations(after)[MAX] == "8"
    later = copy.deepcopy(after)
    del later["metadata"]["annotations"]["gpufn.dev/max"]
    assert template_annotations(admitted(later, after))[MAX] == "8"


def test_a_deploy_of_func_that_wipes_annotations_and_keeps_the_rest_is_followed_too():
    before = admitted(service({"exec-timeout": "1m", "in-flight": "2"}))
    after = copy.deepcopy(before)
    after["metadata"]["annotations"] = {"gpufn.dev/exec-timeout": "2m"}
    after["spec"]["template"]["metadata"]["annotations"] = {"gpufn.dev/exec-timeout": "2m"}
    found = admitted(after, before)
    assert template_spec(found)["timeoutSeconds"] == 420
    assert "containerConcurrency" not in template_spec(found)


@pytest.mark.parametrize("garbage", ["", "{", "[1]", '{"/metadata": null}', '{"": 1}', "7"])
def test_a_record_that_cannot_be_read_makes_nothing_of_the_users_ours(garbage):
    before = service({"max": "2", DERIVED_ANNOTATION: garbage}, {"example.com/mine": "1"})
    assert template_annotations(admitted(before))["example.com/mine"] == "1"


def test_the_record_is_for_people_too():
    found = admitted(service({"max": "2"}))["metadata"]["annotations"][DERIVED_ANNOTATION]
    assert json.loads(found)["/metadata/annotations/autoscaling.knative.dev~1max-scale"] == "2"


# A template with a name -------------------------------------------------------------------------


def test_a_named_template_is_patched_when_it_is_new():
    assert template_annotations(admitted(service({"max": "2"}, name="embed-one")))[MAX] == "2"
    before = admitted(service({"max": "2"}, name="embed-one"))
    assert template_annotations(admitted(service({"max": "3"}, name="embed-two"), before))[MAX] == "3"


def test_under_the_same_name_the_template_stays_as_it_was_and_that_is_said():
    before = admitted(service({"max": "2"}, name="embed-one"))
    after = copy.deepcopy(before)
    after["metadata"]["annotations"]["gpufn.dev/max"] = "5"
    answer = admit(after, before)
    found = jsonpatch.apply_patch(after, list(answer.operations))
    assert found["spec"]["template"] == before["spec"]["template"]
    assert any("embed-one" in warning for warning in answer.warnings)


def test_a_named_template_that_is_sent_again_as_it_was_written_is_no_change():
    written = service({"max": "2", "gpu": "1"}, name="embed-one")
    before = admitted(written)
    assert admitted(written, before)["spec"]["template"] == before["spec"]["template"]
