"""A Knative Service's template rests on what its user wrote now, not on how it came to be."""

import copy
import json

import jsonpatch
import jsonpointer
from hypothesis import assume, given, strategies as st

from adapter.errors import ConfigError
from adapter.keys import DERIVED_ANNOTATION
from adapter.knative.autoscaling import MAX_SCALE, RETENTION, WINDOW, Defaults, keep_alive, kept_s, reach_s
from adapter.knative.service_patch import patch_service

VALUES = {
    "gpufn.dev/gpu": ("1", "2", "0.5"),
    "gpufn.dev/max": ("3", "9"),
    "gpufn.dev/min": ("0", "1"),
    "gpufn.dev/idle": ("0", "auto", "20s", "10m", "3h"),
    "gpufn.dev/in-flight": ("1", "4"),
    "gpufn.dev/start-timeout": ("2m", "20m"),
    "gpufn.dev/exec-timeout": ("0", "30s"),
    "gpufn.dev/snapshot": ("off",),
}
THEIRS = {MAX_SCALE: ("2", "40"), RETENTION: ("0s", "5m"), WINDOW: ("6s", "90s"), "example.com/a": ("b",)}
WRITTEN = st.fixed_dictionaries({}, optional={key: st.sampled_from(found) for key, found in VALUES.items()})
TEMPLATES = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from(found) for key, found in (THEIRS | VALUES).items()}
)
SPECS = st.fixed_dictionaries(
    {}, optional={"timeoutSeconds": st.sampled_from((30, 600)), "containerConcurrency": st.sampled_from((0, 7))}
)
LIMITS = st.fixed_dictionaries({}, optional={"nvidia.com/gpu": st.sampled_from(("1", "2"))})


@st.composite
def services(draw):
    container = {"image": "i", "resources": {"limits": draw(LIMITS)}}
    return {
        "metadata": {"name": "f", "annotations": draw(WRITTEN)},
        "spec": {
            "template": {
                "metadata": {"annotations": draw(TEMPLATES)},
                "spec": {"containers": [container], **draw(SPECS)},
            }
        },
    }


def admitted(new, old=None):
    try:
        answer = patch_service(new, old, namespace="ns", namespace_labels={}, defaults=Defaults())
    except ConfigError:
        assume(False)
    return jsonpatch.apply_patch(new, list(answer.operations))


def written_over(before, new):
    """As `kubectl apply` merges: what the user wrote before and does not now goes, what others put there stays."""
    written, found = before[0], copy.deepcopy(before[1])

    def merge(was, is_now, there):
        for key in was.keys() - is_now.keys():
            there.pop(key, None)
        for key, value in is_now.items():
            if isinstance(value, dict):
                merge(was.get(key, {}), value, there.setdefault(key, {}))
            elif isinstance(value, list):
                merge(was[key][0], value[0], there[key][0])
            else:
                there[key] = value

    merge(written, new, found)
    return found


def says_what_we_said(before, now):
    """What a user writes where we had put just that counts as ours: nobody could tell."""
    ours = json.loads(before["metadata"]["annotations"].get(DERIVED_ANNOTATION, "{}"))
    template = now["spec"]["template"]
    return any(jsonpointer.resolve_pointer(template, path, None) == value for path, value in ours.items())


@given(services())
def test_what_was_admitted_is_admitted_unchanged(service):
    once = admitted(service)
    assert admitted(once) == once
    assert admitted(once, once) == once


@given(services(), services())
def test_a_service_that_was_changed_is_as_one_that_was_made_so(first, second):
    before = admitted(first)
    fresh = admitted(second)
    assume(not says_what_we_said(before, second))
    changed = admitted(written_over((first, before), second), before)
    assert changed["spec"] == fresh["spec"]
    changed["metadata"]["annotations"].pop(DERIVED_ANNOTATION, None)
    fresh["metadata"]["annotations"].pop(DERIVED_ANNOTATION, None)
    assert changed["metadata"] == fresh["metadata"]


@given(services())
def test_nothing_that_the_user_wrote_is_lost_or_changed(service):
    after = admitted(service)
    for of in (lambda s: s["metadata"]["annotations"], lambda s: s["spec"]["template"]["metadata"]["annotations"]):
        assert of(after).items() >= of(service).items()
    before_spec, after_spec = service["spec"]["template"]["spec"], after["spec"]["template"]["spec"]
    assert after_spec.items() >= {k: v for k, v in before_spec.items() if k != "containers"}.items()
    limits = before_spec["containers"][0]["resources"]["limits"]
    assert after_spec["containers"][0]["resources"]["limits"].items() >= limits.items()


@given(st.floats(1, 10_000), st.sampled_from((6, 30, 60, 600)), st.none() | st.integers(6, 3600))
def test_a_keep_alive_is_said_to_the_second_as_far_as_knative_goes(seconds, window_s, own_s):
    defaults = Defaults(window_s=window_s)
    theirs = {} if own_s is None else {WINDOW: f"{own_s}s"}
    found = {**theirs, **keep_alive(seconds, defaults, theirs)}
    least = 6 if own_s is None else own_s
    assert abs(kept_s(defaults, found) - min(max(seconds, least), reach_s(defaults, theirs))) <= 1
