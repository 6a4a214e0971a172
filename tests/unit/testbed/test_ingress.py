"""What the testbed's ingress makes of a KIngress: who is asked, and what is told to whom."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from tests.testbed.ingress import Split, addresses, choose, is_told, ready_status, routes


def kingress(*paths, hosts=("echo.ours.functions.test",)):
    return {
        "metadata": {"namespace": "ours", "name": "echo", "generation": 3},
        "spec": {"rules": [{"hosts": list(hosts), "http": {"paths": list(paths)}}]},
    }


def path(*splits, **more):
    return {"splits": list(splits), **more}


def split(name, percent=100, **headers):
    made = {"serviceName": name, "serviceNamespace": "ours", "servicePort": 80, "percent": percent}
    return {**made, "appendHeaders": headers}


def chosen(ingress, asked_path="/", **headers):
    """The name of the service behind the path and headers."""
    found = routes(ingress)["echo.ours.functions.test"]
    route = next(route for route in found if route.fits(asked_path, CIMultiDict(headers)))
    return route.splits[0].service[1]


def test_every_host_of_a_rule_leads_to_its_splits():
    found = routes(kingress(path(split("one")), hosts=("echo.ours", "echo.ours.svc")))
    assert found["echo.ours"] == found["echo.ours.svc"]
    assert found["echo.ours"][0].splits[0].service == ("ours", "one")


def test_the_longest_path_wins():
    ingress = kingress(path(split("all")), path(split("deep"), path="/v1"))
    assert chosen(ingress, "/v1/x") == "deep"
    assert chosen(ingress, "/v2") == "all"


def test_a_path_that_wants_a_header_is_for_requests_that_have_it():
    ingress = kingress(path(split("all")), path(split("tagged"), headers={"Knative-Serving-Tag": {"exact": "blue"}}))
    assert chosen(ingress, **{"knative-serving-tag": "blue"}) == "tagged"
    assert chosen(ingress, **{"knative-serving-tag": "red"}) == "all"
    assert chosen(ingress) == "all"


@pytest.mark.parametrize(("dice", "name"), [(0.0, "small"), (0.099, "small"), (0.1, "large"), (0.999, "large")])
def test_splits_have_their_shares(dice, name):
    splits = [Split(("ours", "small"), "80", 10, {}), Split(("ours", "large"), "80", 90, {})]
    assert choose(splits, lambda: dice).service[1] == name


def test_a_share_of_nothing_is_never_chosen():
    splits = [Split(("ours", "none"), "80", 0, {}), Split(("ours", "all"), "80", 100, {})]
    assert choose(splits, lambda: 0.0).service[1] == "all"


def test_only_ready_endpoints_of_the_asked_port_are_addresses():
    service = {"spec": {"ports": [{"name": "http", "port": 80}, {"name": "metrics", "port": 9090}]}}
    subset = {
        "addresses": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}],
        "notReadyAddresses": [{"ip": "10.0.0.3"}],
        "ports": [{"name": "http", "port": 8012}, {"name": "metrics", "port": 9091}],
    }
    assert addresses(service, {"subsets": [subset]}, "80") == ["10.0.0.1:8012", "10.0.0.2:8012"]
    assert addresses(service, {"subsets": [subset]}, "http") == ["10.0.0.1:8012", "10.0.0.2:8012"]
    assert addresses(service, {}, "80") == []


def test_a_changed_ingress_is_told_anew():
    ingress = kingress(path(split("one")))
    assert not is_told(ingress)
    ingress["status"] = ready_status(ingress, "ingress.test", "2026-01-01T00:00:00Z")
    assert is_told(ingress)
    ingress["metadata"]["generation"] = 4
    assert not is_told(ingress)
