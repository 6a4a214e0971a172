import asyncio

from adapter.cluster.health import new_registry
from adapter.controller.metrics import ControllerMetrics
from adapter.controller.unplaced import LATER_REASON, REASON, UnplacedPods
from tests.fakes.cluster_objects import View, function_pod, namespace, node


class Events:
    def __init__(self):
        self.said = []

    async def say(self, about, reason, message):
        self.said.append((about["kind"], about["name"], reason, message))


class Scene:
    def __init__(self, *objects):
        self.view, self.events, self.registry = View(*objects, namespace("team")), Events(), new_registry()
        self.reconciler = UnplacedPods(self.view, self.events, ControllerMetrics(self.registry))
        self.changed = []
        self.reconciler.start(self.changed.append)

    def put(self, pod):
        name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        self.view.pods._set(name, self.view.pods._project(pod))

    def look(self, key="team/fn"):
        return asyncio.run(self.reconciler.reconcile(key))

    def waiting(self, later):
        return self.registry.get_sample_value("gpufn_unplaced_pods", {"later": later})


def test_a_pod_that_no_node_fits_says_each_reason_with_its_count():
    scene = Scene(node("n1", gpus=1), node("n2", gpus=2), node("cpu", gpus=0))
    scene.put(function_pod(gpus=4))
    assert scene.changed == ["team/fn"]
    assert scene.look() is not None
    [(kind, name, reason, message)] = scene.events.said
    assert (kind, name, reason) == ("Pod", "fn", REASON)
    assert "2: too few GPUs" in message
    assert "1: no GPU" in message
    assert scene.waiting("false") == 1


def test_a_pod_that_may_fit_later_says_so():
    scene = Scene(node("n1", gpus=1))
    scene.put(function_pod("other", gpus=1, node_name="n1"))
    scene.put(function_pod())
    scene.look()
    assert scene.events.said[0][2] == LATER_REASON
    assert (scene.waiting("true"), scene.waiting("false")) == (1, 0)


def test_a_pod_that_a_node_fits_is_the_schedulers():
    scene = Scene(node("n1"))
    scene.put(function_pod())
    scene.look()
    assert not scene.events.said


def test_what_has_found_its_node_or_is_gone_is_not_counted_any_more():
    scene = Scene(node("n1", gpus=1))
    scene.put(function_pod(gpus=4))
    scene.look()
    scene.put(function_pod(gpus=4, node_name="n1"))
    assert scene.look() is None
    assert scene.waiting("false") == 0
    assert not list(scene.reconciler.all_keys())


def test_people_who_look_at_the_knative_service_see_it_too():
    scene = Scene(node("n1", gpus=0))
    labels = {"serving.knative.dev/service": "fn", "serving.knative.dev/revision": "fn-00001"}
    scene.put(function_pod(**labels, **{"serving.knative.dev/serviceUID": "u-9"}))
    scene.look()
    assert [(kind, name) for kind, name, _, _ in scene.events.said] == [("Pod", "fn"), ("Service", "fn")]


def test_a_pod_whose_annotations_cannot_be_used_says_which():
    scene = Scene(node("n1"))
    scene.put(function_pod(annotations={"gpufn.dev/idle": "-5s"}))
    scene.look()
    assert "gpufn.dev/idle" in scene.events.said[0][3]


def test_what_went_while_another_led_is_not_counted_when_it_leads_again():
    scene = Scene(node("n1", gpus=1))
    for name in ("a", "b"):
        scene.put(function_pod(name, gpus=4))
        scene.look(f"team/{name}")
    assert scene.waiting("false") == 2
    scene.view.pods._set("team/a", None)
    for key in scene.reconciler.all_keys():
        scene.look(key)
    assert scene.waiting("false") == 1
