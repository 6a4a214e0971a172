"""The provider in a pod of its own, with the rights of the manifests and no more, spoken to as faas-cli speaks."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from adapter.keys import SYSTEM_NAMESPACE as SYSTEM
from tests.cluster.openfaas import function_images
from tests.testbed.cluster import Cluster
from tests.testbed.installation import FUNCTIONS, LOGIN, Installation
from tests.testbed.machines import wait_until

SECOND = "openfaas-second"
LIMIT_S = 120.0


@dataclass
class Gateway:
    """Speaks to the provider by its Service."""

    cluster: Cluster
    images: dict[str, str]
    url: str

    def say(self, method: str, path: str, body=None, *, auth=LOGIN, **options):
        return requests.request(method, self.url + path, json=body, auth=auth, timeout=LIMIT_S, **options)

    def deploy(self, name: str, image: str = "echo", namespace: str = FUNCTIONS, annotations=None, **fields):
        own = {"gpufn.dev/snapshot": "off", "gpufn.dev/initial": "0", **(annotations or {})}
        body = {"service": name, "image": self.images[image], "namespace": namespace, "annotations": own, **fields}
        answer = self.say("PUT", "/system/functions", body)
        if answer.status_code == 404:
            answer = self.say("POST", "/system/functions", body)
        return answer

    def call(self, name: str, text: str = "hi"):
        answer = requests.post(f"{self.url}/function/{name}", data=text.encode(), timeout=LIMIT_S)
        return answer.status_code, answer.text

    def pods(self, name: str, namespace: str = FUNCTIONS) -> list[str]:
        found = self.cluster.get("pods", f"--namespace={namespace}", f"--selector=faas_function={name}")["items"]
        return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def remove(self, name: str, namespace: str = FUNCTIONS) -> None:
        answer = self.say("DELETE", "/system/functions", {"functionName": name, "namespace": namespace})
        assert answer.status_code == 202, answer.text
        wait_until(f"end of {name}'s pods", lambda: not self.pods(name, namespace), LIMIT_S)


@pytest.fixture(scope="module")
def gateway(gpufn: Installation, tmp_path_factory) -> Gateway:
    cluster = gpufn.cluster
    images = function_images(cluster, tmp_path_factory.mktemp("functions"))
    address = cluster.get("service", "gateway", f"--namespace={SYSTEM}")["spec"]["clusterIP"]
    return Gateway(cluster, images, f"http://{address}:8080")


def provider_pod(cluster: Cluster) -> dict:
    selector = "--selector=app.kubernetes.io/component=provider"
    (pod,) = [
        pod
        for pod in cluster.get("pods", f"--namespace={SYSTEM}", selector)["items"]
        if "deletionTimestamp" not in pod["metadata"]
    ]
    return pod


def kill_nine(pod: dict) -> None:
    """The provider's process, as an out-of-memory killer would: from outside of its container."""
    name = f"HOSTNAME={pod['metadata']['name']}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_it = (
                b"adapter.openfaas" in (folder / "cmdline").read_bytes() and name in (folder / "environ").read_bytes()
            )
        except OSError:  # it has ended
            continue
        if is_it:
            os.kill(int(folder.name), signal.SIGKILL)
            return
    raise AssertionError("the provider has no process")


class Load:
    """Requests one after another in some threads; what came back, or did not, is counted."""

    def __init__(self, gateway: Gateway, name: str, lanes: int = 3) -> None:
        self.answers: Counter = Counter()
        self._ends = threading.Event()
        self._pool = ThreadPoolExecutor(lanes)
        self._work = [self._pool.submit(self._lane, gateway, name) for _ in range(lanes)]

    def _lane(self, gateway: Gateway, name: str) -> None:
        while not self._ends.is_set():
            try:
                self.answers[gateway.call(name)] += 1
            except requests.RequestException as error:
                self.answers[type(error).__name__] += 1
                self._ends.wait(0.05)  # refused at once: nobody listens

    def more(self, count: int, answer=None) -> None:
        """Until so many more came back."""
        goal = self.count(answer) + count
        wait_until(f"{count} more answers", lambda: self.count(answer) >= goal, LIMIT_S)

    def count(self, answer=None) -> int:
        return self.answers[answer] if answer else sum(self.answers.values())

    def end(self) -> Counter:
        self._ends.set()
        for work in self._work:
            work.result()
        self._pool.shutdown()
        return self.answers


def test_deployers_are_asked_for_a_password_and_callers_are_not(gateway):
    assert gateway.say("GET", "/system/functions", auth=None).status_code == 401
    assert gateway.say("GET", "/system/functions", auth=("admin", "wrong")).status_code == 401
    info = gateway.say("GET", "/system/info").json()["provider"]
    assert (info["provider"], info["orchestration"]) == ("gpufn", "kubernetes")
    assert gateway.call("absent")[0] == 404


def test_a_function_lives_with_the_rights_of_the_manifests_alone(gateway):
    secret = {"name": "life-token", "namespace": FUNCTIONS, "value": "seven"}
    assert gateway.say("POST", "/system/secrets", secret).status_code == 202
    answer = gateway.deploy("life", secrets=["life-token"], envVars={"GREETING": "hello"}, labels={"team": "ml"})
    assert answer.status_code == 202, answer.text
    assert gateway.call("life", "secret life-token") == (200, "seven")
    assert gateway.call("life", "print something") == (200, "hello print something")
    query = f"/system/logs?name=life&namespace={FUNCTIONS}"
    wait_until("what it printed", lambda: '"something"' in gateway.say("GET", query).text, LIMIT_S)
    lines = [json.loads(line)["text"] for line in gateway.say("GET", query).text.splitlines()]
    assert lines == ["loaded", "something"]
    assert gateway.say("DELETE", "/system/secrets", secret).status_code == 202
    gateway.remove("life")
    for kind in ("configmaps", "services"):
        found = ("get", kind, f"--namespace={FUNCTIONS}", "--selector=faas_function=life", "--output=name")
        wait_until(f"end of its {kind}", lambda found=found: not gateway.cluster.kubectl(*found), LIMIT_S)


def test_two_hundred_requests_at_zero_are_answered_by_one_pod(gateway):
    assert gateway.deploy("many", "slow", annotations={"gpufn.dev/in-flight": "8"}).status_code == 202
    with ThreadPoolExecutor(200) as pool:
        texts = [f"number {n}" for n in range(200)]
        answers = Counter(pool.map(lambda text: gateway.call("many", text), texts))
    assert answers == Counter((200, text) for text in texts)
    assert len(gateway.pods("many")) == 1
    gateway.remove("many")


def test_a_provider_that_is_killed_under_load_comes_back_to_the_same_pods(gateway):
    assert gateway.deploy("lasting").status_code == 202
    load = Load(gateway, "lasting")
    load.more(50)
    pods = gateway.pods("lasting")
    before = provider_pod(gateway.cluster)
    kill_nine(before)
    load.more(100, (200, " hi"))
    answers = load.end()
    refused = {kind for kind in answers if kind != (200, " hi")}
    assert refused <= {"ConnectionError", "ChunkedEncodingError", "ReadTimeout", "ConnectTimeout"}, answers
    assert gateway.pods("lasting") == pods
    after = provider_pod(gateway.cluster)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["containerStatuses"][0]["restartCount"] == 1
    gateway.remove("lasting")


def test_a_provider_that_is_rolled_out_anew_loses_no_request(gateway):
    assert gateway.deploy("rolled").status_code == 202
    load = Load(gateway, "rolled")
    load.more(20)
    pods = gateway.pods("rolled")
    where = f"--namespace={SYSTEM}"
    gateway.cluster.kubectl("rollout", "restart", "deployment/gpufn-provider", where)
    gateway.cluster.kubectl("rollout", "status", "deployment/gpufn-provider", where, "--timeout=180s")
    load.more(50)
    assert set(load.end()) == {(200, " hi")}
    assert gateway.pods("rolled") == pods
    gateway.remove("rolled")


def test_two_namespaces_are_apart(gateway):
    cluster = gateway.cluster
    cluster.make_namespace(SECOND)
    bound = ("--clusterrole", "gpufn-provider-functions", "--serviceaccount", f"{SYSTEM}:gpufn-provider")
    cluster.kubectl("create", "rolebinding", "gpufn-provider", f"--namespace={SECOND}", *bound)
    cluster.kubectl("label", "namespace", SECOND, "openfaas=1")
    wait_until("the namespace", lambda: SECOND in gateway.say("GET", "/system/namespaces").json(), LIMIT_S)
    for namespace, value in ((FUNCTIONS, "first"), (SECOND, "second")):
        secret = {"name": f"{value}-token", "namespace": namespace, "value": value}
        assert gateway.say("POST", "/system/secrets", secret).status_code == 202
        answer = gateway.deploy("both", namespace=namespace, secrets=[f"{value}-token"], envVars={"GREETING": value})
        assert answer.status_code == 202, answer.text
    assert gateway.call("both") == gateway.call(f"both.{FUNCTIONS}") == (200, "first hi")
    assert gateway.call(f"both.{SECOND}") == (200, "second hi")
    assert gateway.call(f"both.{SECOND}", "secret first-token")[0] == 500
    refused = gateway.deploy("other", namespace=SECOND, secrets=["first-token"])
    assert (refused.status_code, "first-token" in refused.text) == (400, True)
    names = [one["name"] for one in gateway.say("GET", f"/system/functions?namespace={SECOND}").json()]
    assert names == ["both"]
    cluster.kubectl("delete", "namespace", SECOND)  # with all that is in it
    wait_until("its end", lambda: SECOND not in gateway.say("GET", "/system/namespaces").json(), LIMIT_S)
    assert gateway.call(f"both.{SECOND}")[0] == 404
    assert gateway.call("both") == (200, "first hi")
    gateway.remove("both")


def test_an_image_that_nobody_has_is_told_to_callers_and_deployers(gateway):
    gateway.images["absent"] = "dev.local/nobody-has-it:1"
    assert gateway.deploy("absent", "absent").status_code == 202
    code, text = gateway.call("absent")
    assert (code, json.loads(text)["error"]["code"]) == (503, "image-pull-failed")
    told = gateway.say("GET", f"/system/function/absent?namespace={FUNCTIONS}").json()
    assert told["annotations"]["gpufn.dev/status"].startswith("failed: ")
    gateway.remove("absent")


def test_no_gpu_for_it_is_told_while_it_waits(gateway):
    answer = gateway.deploy("hungry", annotations={"gpufn.dev/gpu": "16", "gpufn.dev/start-timeout": "10s"})
    assert answer.status_code == 202, answer.text

    def waits_for() -> str:
        told = gateway.say("GET", f"/system/function/hungry?namespace={FUNCTIONS}").json()["annotations"]
        return str(told.get("gpufn.dev/status", "")).removeprefix("waiting: no node takes it: ")

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(gateway.call, "hungry")
        wait_until("word of a GPU", lambda: "GPU" in waits_for(), LIMIT_S)  # in the webhook's words
        code, text = call.result()
    error = json.loads(text)["error"]
    assert (code, error["code"]) == (503, "no-node")
    assert "GPU" in error["why"]
    gateway.remove("hungry")


def test_a_spent_budget_is_told_to_callers(gateway):
    own = {"gpufn.dev/gpu": "1", "gpufn.dev/budget": "2s", "gpufn.dev/idle": "6s"}
    assert gateway.deploy("frugal", annotations=own).status_code == 202
    assert gateway.call("frugal")[0] == 200
    # What runs answers and stays: it is asked only when it has gone.
    wait_until("refusal", lambda: not gateway.pods("frugal") and gateway.call("frugal")[0] == 429, LIMIT_S)
    status, text = gateway.call("frugal")
    assert (status, json.loads(text)["error"]["code"]) == (429, "budget-spent")
    assert not gateway.pods("frugal")
    gateway.remove("frugal")


def test_functions_stay_when_the_provider_is_removed(gateway):
    assert gateway.deploy("staying").status_code == 202
    assert gateway.call("staying") == (200, " hi")
    pods = gateway.pods("staying")
    where = f"--namespace={SYSTEM}"
    gateway.cluster.kubectl("scale", "deployment/gpufn-provider", "--replicas=0", where)
    provider = "--selector=app.kubernetes.io/component=provider"
    gateway.cluster.kubectl("wait", "pod", provider, "--for=delete", "--timeout=120s", where)
    assert gateway.pods("staying") == pods
    address = gateway.cluster.get("service", "staying", f"--namespace={FUNCTIONS}")["spec"]["clusterIP"]
    assert requests.post(f"http://{address}:8080/", data=b"there", timeout=LIMIT_S).text == " there"
    gateway.cluster.kubectl("scale", "deployment/gpufn-provider", "--replicas=1", where)
    gateway.cluster.kubectl("rollout", "status", "deployment/gpufn-provider", where, "--timeout=120s")
    assert gateway.call("staying") == (200, " hi")
    assert gateway.pods("staying") == pods
    gateway.remove("staying")
