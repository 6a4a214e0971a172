"""Manifests say what they must and no more: rights, bounds, names that other files and the code spell alike.

What Kustomize and an API server make of them is in tests/cluster/test_manifests.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter import keys
from adapter.controller import snapshot_pod
from adapter.hosts.seccomp import RESTORE_RIGHT
from adapter.replica import TASK_SNAPSHOT
from scripts.adapter_image import extras, requirements

MANIFESTS = Path(__file__).parents[2] / "manifests"
FILES = sorted(path for path in MANIFESTS.rglob("*.yaml"))
Object = dict[str, Any]


def objects() -> Iterator[Object]:
    """Those of all files; patches are lists, and a kustomization has no name."""
    for path in FILES:
        for item in yaml.safe_load_all(path.read_text()):
            if isinstance(item, dict) and "metadata" in item:
                yield item


ALL = list(objects())


def of_kind(*kinds: str) -> list[Object]:
    return [item for item in ALL if item["kind"] in kinds]


def named(item: Object) -> str:
    metadata = item["metadata"]
    return f"{item['kind']}/{metadata.get('namespace', '')}/{metadata['name']}"


def by_name(items: list[Object]) -> Any:
    return pytest.mark.parametrize("item", items, ids=named)


WORKLOADS = of_kind("Deployment", "DaemonSet", "StatefulSet")
OURS = [item for item in WORKLOADS if item["metadata"]["name"] != "gpufn-postgresql"]
ROLES = of_kind("Role", "ClusterRole")
WEBHOOKS = [hook for item in of_kind("MutatingWebhookConfiguration") for hook in item["webhooks"]] + [
    patch["value"] for patch in yaml.safe_load((MANIFESTS / "components" / "knative" / "webhook.yaml").read_text())
]


def template(workload: Object) -> Object:
    found: Object = workload["spec"]["template"]
    return found


def containers(workload: Object) -> list[Object]:
    spec = template(workload)["spec"]
    return [*spec["containers"], *spec.get("initContainers", ())]


def ports(workload: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for item in containers(workload) for port in item.get("ports", ())}


def selected(selector: Object, namespace: str) -> list[Object]:
    """Workloads whose pods these matchLabels and matchExpressions (of `In` only) mean."""
    wanted = {key: {value} for key, value in selector.get("matchLabels", {}).items()}
    wanted |= {item["key"]: set(item["values"]) for item in selector.get("matchExpressions", ())}
    return [
        item
        for item in WORKLOADS
        if item["metadata"]["namespace"] == namespace
        and all(template(item)["metadata"]["labels"].get(key) in values for key, values in wanted.items())
    ]


# Files ----------------------------------------------------------------------------------------------------------


def test_every_file_is_used_by_a_kustomization():
    used = set()
    for path in FILES:
        if path.name == "kustomization.yaml":
            content = yaml.safe_load(path.read_text())
            names = [*content.get("resources", ()), *content.get("components", ())]
            names += [patch["path"] for patch in content.get("patches", ()) if "path" in patch]
            names += [name for made in content.get("configMapGenerator", ()) for name in made["files"]]
            for name in names:
                target = (path.parent / name).resolve()
                assert target.exists(), (path, name)
                used.add(target)
    unused = [path for path in FILES if path.name != "kustomization.yaml" and path not in used]
    assert not unused


def test_no_two_objects_have_one_name():
    names = [named(item) for item in ALL]
    assert sorted(names) == sorted(set(names))


def test_the_image_is_named_in_one_place():
    assert {container["image"] for item in OURS for container in containers(item)} == {"gpufn"}
    naming = [path for path in FILES if "newName" in path.read_text()]
    assert naming == [MANIFESTS / "image" / "kustomization.yaml"]


def test_every_overlay_runs_that_image():
    for path in (MANIFESTS / "overlays").glob("*/kustomization.yaml"):
        assert yaml.safe_load(path.read_text())["components"][-1] == "../../image", path


# Removal --------------------------------------------------------------------------------------------------------


def test_nothing_holds_up_its_own_removal():
    assert not [named(item) for item in ALL if "finalizers" in item["metadata"] or item["kind"] == "APIService"]


def test_functions_namespaces_are_not_ours_to_remove():
    names = {item["metadata"]["name"] for item in of_kind("Namespace")}
    assert names == {keys.SYSTEM_NAMESPACE, "gpufn-agents"}


# Rights ---------------------------------------------------------------------------------------------------------


def rules(role: Object) -> list[Object]:
    found: list[Object] = role.get("rules", [])
    return found


@by_name(ROLES)
def test_no_role_says_everything(item):
    for rule in rules(item):
        assert "*" not in {*rule["verbs"], *rule["resources"], *rule["apiGroups"]}
        assert not {"escalate", "bind", "impersonate", "deletecollection"} & set(rule["verbs"])


def test_every_rule_says_why():
    for path in FILES:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if "apiGroups:" in line and "verbs:" in line and "roleRef" not in line:
                above = number - 1
                while "verbs:" in lines[above]:  # one reason may be that of two rules
                    above -= 1
                assert lines[above].lstrip().startswith("#"), f"{path.name}:{number + 1}"


def bound_everywhere() -> set[str]:
    return {item["roleRef"]["name"] for item in of_kind("ClusterRoleBinding")}


@by_name([item for item in of_kind("ClusterRole") if item["metadata"]["name"] in bound_everywhere()])
def test_secrets_are_read_in_no_namespace_but_those_that_say_so(item):
    for rule in rules(item):
        assert not {"secrets", "configmaps", "serviceaccounts/token", "pods/exec"} & set(rule["resources"])


@by_name(of_kind("Role"))
def test_our_own_secrets_are_read_by_their_names(item):
    for rule in rules(item):
        if {"secrets", "configmaps"} & set(rule["resources"]):
            assert rule["verbs"] == ["create"] or rule["resourceNames"]


@by_name(of_kind("RoleBinding", "ClusterRoleBinding"))
def test_every_binding_joins_a_role_and_an_account_that_exist(item):
    namespace = item["metadata"].get("namespace", "")
    kind, name = item["roleRef"]["kind"], item["roleRef"]["name"]
    where = namespace if kind == "Role" else ""
    assert f"{kind}/{where}/{name}" in {named(role) for role in ROLES}
    accounts = {named(account) for account in of_kind("ServiceAccount")}
    assert {f"ServiceAccount/{subject['namespace']}/{subject['name']}" for subject in item["subjects"]} <= accounts


def rights_of(account: str) -> list[Object]:
    bindings = of_kind("RoleBinding", "ClusterRoleBinding")
    names = {b["roleRef"]["name"] for b in bindings if b["subjects"][0]["name"] == account}
    return [rule for role in ROLES if role["metadata"]["name"] in names for rule in rules(role)]


def test_the_webhook_only_reads():
    assert {verb for rule in rights_of("gpufn-webhook") for verb in rule["verbs"]} == {"list", "watch"}


def test_the_ledger_asks_whose_a_token_is_and_nothing_else():
    [rule] = rights_of("gpufn-ledger")
    assert (rule["resources"], rule["verbs"]) == (["tokenreviews"], ["create"])


def test_agents_write_nothing_but_what_their_nodes_have():
    written = [rule for rule in rights_of("gpufn-agent") if set(rule["verbs"]) - {"get", "list", "watch"}]
    assert {resource for rule in written for resource in rule["resources"]} == {"gpunodes", "gpunodes/status"}
    assert not {"delete", "update"} & {verb for rule in written for verb in rule["verbs"]}


def test_the_reader_has_no_rights_of_its_own():
    assert rights_of("gpufn-reader") == []


def test_the_provider_changes_nothing_outside_functions_namespaces():
    [item] = [item for item in of_kind("ClusterRole") if item["metadata"]["name"] == "gpufn-provider"]
    assert {verb for rule in rules(item) for verb in rule["verbs"]} <= {"get", "list", "watch"}
    assert "gpufn-provider-functions" not in bound_everywhere()


def test_what_rbac_cannot_bound_admission_policies_do():
    bound = {item["spec"]["policyName"] for item in of_kind("ValidatingAdmissionPolicyBinding")}
    assert {item["metadata"]["name"] for item in of_kind("ValidatingAdmissionPolicy")} == bound
    for policy in of_kind("ValidatingAdmissionPolicy"):
        spec = policy["spec"]
        assert spec["failurePolicy"] == "Fail"
        assert spec.get("matchConditions") or spec["matchConstraints"].get("namespaceSelector")  # not everybody's pods
        accounts = re.findall(r"system:serviceaccount:([\w-]+):([\w-]+)", json.dumps(spec))
        assert accounts
        known = {named(item) for item in of_kind("ServiceAccount")}
        assert {f"ServiceAccount/{namespace}/{account}" for namespace, account in accounts} <= known


def test_the_policies_of_snapshot_pods_spell_labels_and_rights_as_the_code_does():
    text = yaml.safe_dump([item["spec"] for item in of_kind("ValidatingAdmissionPolicy")], width=10_000)
    for word in (keys.SNAPSHOTS_LABEL, keys.TASK_LABEL, TASK_SNAPSHOT, RESTORE_RIGHT, snapshot_pod.PRIORITY_CLASS):
        assert word in text


# Pods -----------------------------------------------------------------------------------------------------------


@by_name([item for item in WORKLOADS if item["metadata"]["namespace"] == keys.SYSTEM_NAMESPACE])
def test_components_are_restricted(item):
    pod = template(item)["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not [volume for volume in pod.get("volumes", ()) if "hostPath" in volume]
    for container in containers(item):
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}


def test_the_agent_has_these_rights_on_its_node_and_no_others():
    [agent] = of_kind("DaemonSet")
    pod = template(agent)["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    [container] = containers(agent)
    rights = container["securityContext"]
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN", "DAC_OVERRIDE", "FOWNER", "SETFCAP"]}
    places = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    written = {places[m["name"]] for m in container["volumeMounts"] if m["name"] in places and not m.get("readOnly")}
    assert set(places.values()) - written == {"/var/lib/kubelet/pod-resources", "/var/log/pods"}
    assert written == {"/var/lib/gpufn", "/var/lib/kubelet/seccomp"}


@by_name(WORKLOADS)
def test_containers_say_what_they_need_and_what_they_may_take(item):
    for container in containers(item):
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert container["resources"]["limits"].keys() == {"memory"}


@by_name(OURS)
def test_components_are_asked_whether_they_live_and_are_ready(item):
    for container in containers(item):
        paths = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
        for kind, path in paths.items():
            assert container[kind]["httpGet"] == {"path": path, "port": "metrics"}
        said = template(item)["metadata"]["annotations"]
        assert said["prometheus.io/port"] == str(ports(item)["metrics"])


@by_name([item for item in WORKLOADS if item["spec"].get("replicas", 1) > 1])
def test_what_has_two_replicas_keeps_one_and_spreads_them(item):
    labels = item["spec"]["selector"]["matchLabels"]
    [budget] = [b for b in of_kind("PodDisruptionBudget") if b["spec"]["selector"]["matchLabels"] == labels]
    assert budget["spec"]["minAvailable"] < item["spec"]["replicas"]
    [spread] = template(item)["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels


def test_no_budget_keeps_a_single_replica_from_being_drained():
    for item in of_kind("PodDisruptionBudget"):
        [workload] = selected(item["spec"]["selector"], item["metadata"]["namespace"])
        assert workload["spec"]["replicas"] > 1


@by_name(WORKLOADS)
def test_no_service_becomes_a_variable_that_looks_like_a_setting(item):
    assert template(item)["spec"]["enableServiceLinks"] is False


@by_name(WORKLOADS)
def test_every_mount_has_its_volume(item):
    pod = template(item)["spec"]
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    volumes |= {claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", ())}
    assert volumes == {mount["name"] for container in containers(item) for mount in container["volumeMounts"]}


def test_every_priority_exists():
    classes = {item["metadata"]["name"] for item in of_kind("PriorityClass")}
    used = {template(item)["spec"]["priorityClassName"] for item in WORKLOADS}
    assert used | {snapshot_pod.PRIORITY_CLASS} == classes


def test_pods_that_take_snapshots_give_way_to_every_pod_and_cost_no_node():
    [item] = [item for item in of_kind("PriorityClass") if item["metadata"]["name"] == snapshot_pod.PRIORITY_CLASS]
    assert item["value"] < -10  # below that the cluster autoscaler makes and keeps no node for a pod
    assert item["preemptionPolicy"] == "Never"
    assert not any(item.get("globalDefault") for item in of_kind("PriorityClass"))


def test_a_quota_that_leaves_them_out_leaves_out_nobody_elses_pods():
    """Docs advise one; whoever may make pods may write any class into them that no policy keeps."""
    conditions = [
        [condition["expression"] for condition in policy["spec"]["matchConditions"]]
        for policy in of_kind("ValidatingAdmissionPolicy")
        if [check["expression"] for check in policy["spec"]["validations"]] == ["false"]
    ]
    assert [
        f"has(object.spec.priorityClassName) && object.spec.priorityClassName == '{snapshot_pod.PRIORITY_CLASS}'",
        "request.userInfo.username != 'system:serviceaccount:gpufn-system:gpufn-controller'",
    ] in conditions


# Network --------------------------------------------------------------------------------------------------------


@by_name(of_kind("Service"))
def test_every_service_has_pods_that_listen(item):
    [workload] = selected({"matchLabels": item["spec"]["selector"]}, item["metadata"]["namespace"])
    for port in item["spec"]["ports"]:
        assert ports(workload)[port["targetPort"]] == port["port"]


@by_name(of_kind("NetworkPolicy"))
def test_policies_open_ports_that_their_pods_have(item):
    workloads = selected(item["spec"]["podSelector"], item["metadata"]["namespace"])
    assert workloads
    for rule in item["spec"].get("ingress", ()):
        for port in rule["ports"]:
            assert all(port["port"] in ports(workload) for workload in workloads)
    for rule in item["spec"].get("egress", ()):
        for peer in rule.get("to", ()):
            space = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name")
            [there] = selected(peer["podSelector"], space or item["metadata"]["namespace"])
            assert all(port["port"] in ports(there) for port in rule["ports"])


@pytest.mark.parametrize("namespace", ["gpufn-system", "gpufn-agents"])
def test_nothing_is_open_by_default(namespace):
    specs = [item["spec"] for item in of_kind("NetworkPolicy") if item["metadata"]["namespace"] == namespace]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in specs


# Admission ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", WEBHOOKS, ids=lambda hook: hook["name"])
def test_webhooks_fail_open_soon_and_touch_nothing_of_the_clusters_own(hook):
    assert hook["failurePolicy"] == "Ignore"
    assert hook["timeoutSeconds"] <= 2
    assert hook["sideEffects"] == "None"
    assert hook["reinvocationPolicy"] == "IfNeeded"
    assert hook["matchConditions"]
    [spaces] = hook["namespaceSelector"]["matchExpressions"]
    assert spaces["operator"] == "NotIn"
    assert {"kube-system", keys.SYSTEM_NAMESPACE, "gpufn-agents"} <= set(spaces["values"])
    service = hook["clientConfig"]["service"]
    [found] = [s for s in of_kind("Service") if s["metadata"]["name"] == service["name"]]
    assert found["metadata"]["namespace"] == service["namespace"]
    assert service["port"] in {port["port"] for port in found["spec"]["ports"]}


def test_pods_are_ours_by_the_labels_that_the_code_knows():
    selectors = [hook["objectSelector"]["matchExpressions"] for hook in WEBHOOKS if "objectSelector" in hook]
    assert {(item["key"], item["operator"]) for [item] in selectors} == {
        (keys.KNATIVE_REVISION_LABEL, "Exists"),
        (keys.OPENFAAS_LABEL, "Exists"),
        (keys.FUNCTION_LABEL, "Exists"),
    }


# The image ------------------------------------------------------------------------------------------------------


def test_the_image_installs_extras_that_there_are():
    assert requirements(extras())


def test_all_that_the_dockerfile_copies_is_in_its_context():
    allowed = [
        line[1:] for line in (MANIFESTS.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    text = (MANIFESTS / "image" / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    for source in sources:
        name = source.rstrip("*")
        assert any(name == path or name.startswith(f"{path}/") for path in allowed), source


def test_the_image_is_no_ones_who_is_root():
    users = re.findall(r"^USER (\S+)$", (MANIFESTS / "image" / "Dockerfile").read_text(), re.MULTILINE)
    assert users[-1] == "65532:65532"
    for item in OURS:
        if item["kind"] == "Deployment":
            assert template(item)["spec"]["securityContext"]["runAsUser"] == 65532


# Alerts ---------------------------------------------------------------------------------------------------------


def test_alerts_ask_for_metrics_that_components_have():
    rules_file = MANIFESTS / "components" / "alerts" / "gpufn.rules.yaml"
    asked = set(re.findall(r"gpufn_[a-z_]+", rules_file.read_text()))
    code = "".join(path.read_text() for path in (MANIFESTS.parent / "adapter").rglob("metrics.py"))
    for name in asked:
        assert f'"{re.sub("_(total|bucket)$", "", name)}"' in code, name


def test_alerts_say_what_they_mean():
    content = yaml.safe_load((MANIFESTS / "components" / "alerts" / "gpufn.rules.yaml").read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"].keys() == {"summary", "description"}
            assert rule["labels"]["severity"] in {"warning", "critical"}


# Documents ------------------------------------------------------------------------------------------------------

REFERENCE = (MANIFESTS.parent / "docs" / "reference" / "cluster.md").read_text()


@by_name([*OURS, *of_kind("ServiceAccount", "ValidatingAdmissionPolicy", "CustomResourceDefinition")])
def test_what_people_meet_is_in_the_reference(item):
    name = item["metadata"]["name"]
    if item["kind"] in {"Deployment", "DaemonSet"}:
        assert " ".join(containers(item)[0]["command"]) in REFERENCE
    else:
        assert f"`{name}`" in REFERENCE or f"`{name}." in REFERENCE


def test_settings_in_the_reference_are_read_by_the_code():
    table = REFERENCE.split("## Settings")[1].split("\n## ")[0]
    code = "".join(path.read_text() for path in (MANIFESTS.parent / "adapter").rglob("*.py"))
    for name in re.findall(r"^\| [^|]+ \| `(\w+)`", table, re.MULTILINE):
        assert f'"{name}"' in code, name
