"""Revisions of Knative as the API server shows them to the tuner; tests/cluster has real ones."""

from adapter.knative.tuning import read_autoscaler, read_revision


def revision_json(annotations=None, ours=None, *, state="active", manager="gpufn", limits=None):
    own = {f"f:{key}": {} for key in ours or {}}
    return {
        "metadata": {
            "name": "embed-00001",
            "namespace": "team",
            "uid": "u-1",
            "labels": {"serving.knative.dev/service": "embed", "serving.knative.dev/routingState": state},
            "annotations": {"gpufn.dev/gpu": "1", **(annotations or {}), **(ours or {})},
            "managedFields": [
                {"manager": "controller", "operation": "Update", "fieldsV1": {"f:metadata": {"f:annotations": {}}}},
                {
                    "manager": manager,
                    "operation": "Apply",
                    "fieldsV1": {"f:metadata": {"f:annotations": own}},
                },
            ],
        },
        "spec": {"containers": [{"name": "user-container", "image": "i", "resources": {"limits": limits or {}}}]},
    }


def revision(annotations=None, ours=None, **more):
    found = read_revision(revision_json(annotations, ours, **more))
    assert found is not None
    return found


def autoscaler(theirs=None, ours=None, *, version=5):
    value = revision_json(theirs, ours)
    value["metadata"] |= {"uid": "u-2", "resourceVersion": str(version)}
    found = read_autoscaler(value)
    assert found is not None
    return found
