"""Every name that two parts of gpufn, or gpufn and its user, must spell alike.

Owns strings only. What a value means is said in `adapter.spec` (what users write),
`adapter.replica` (what a host tells a replica) and `adapter.records` (what a replica says).
"""

from __future__ import annotations

DOMAIN = "gpufn.dev"
"""Domain of our annotations and labels; the part after the slash is a key of `adapter.spec.FIELDS`."""

CONTRACT_VERSION = 1
"""Version of the function contract (handler, hooks, files) that a function image states."""

# Files of a function folder.
HANDLER_FILE = "handler.py"
CONFIG_FILE = "gpufn.toml"
EXAMPLES_FOLDER = "examples"
REQUIREMENTS_FILE = "requirements.txt"
REQUIREMENTS_NODEPS_FILE = "requirements-nodeps.txt"
"""Packages to install without what they depend on (``pip install --no-deps``)."""
STACK_FILE = "stack.yaml"
"""OpenFaaS's: what `faas-cli deploy -f` reads."""

SHIM_REQUIREMENTS = ("flask>=3.0,<4", "gunicorn>=27,<28")
"""What the shim needs beside the function's own requirements."""

# HTTP headers (the first three are OpenFaaS's).
CALL_ID_HEADER = "X-Call-Id"
DURATION_HEADER = "X-Duration-Seconds"
CALLBACK_HEADER = "X-Callback-Url"
TIMEOUT_HEADER = "X-Timeout"
START_PATH_HEADER = "X-Gpufn-Start"
"""Set by a gateway on the answer to a request that waited for a replica: the rung that served it."""
ERROR_HEADER = "X-Gpufn-Error"
"""Set by a gateway where an error's body is OpenFaaS's plain text: the error's code."""

# Paths that a replica answers itself, with and without a model behind it.
LIVENESS_PATHS = frozenset({"/_/health", "/health/liveness"})
READINESS_PATHS = frozenset({"/_/ready", "/health/readiness"})

SECRETS_PATH = "/var/openfaas/secrets"
"""Where OpenFaaS handlers look for secrets: one file each, named as the secret."""

SNAPSHOT_PATH = "/var/lib/gpufn/snapshots"
"""Where a function image looks for its snapshots: a folder of the node, mounted there."""

MODEL_DIR = "MODEL_DIR"
"""Variable of a function whose image brings weights: the folder with the model's configuration and files."""

# On Kubernetes.
SYSTEM_NAMESPACE, AGENT_NAMESPACE = "gpufn-system", "gpufn-agents"
"""Where our own components run; agents, whose rights on nodes they have not, apart from them."""
AGENT_ACCOUNT = "gpufn-agent"
FIELD_MANAGER = "gpufn"
"""Ours in server-side apply."""
FUNCTION_LABEL = f"{DOMAIN}/function"
"""Label of a pod that is a function's though neither Knative nor OpenFaaS made it; its value is the function's name."""
REVISION_LABEL = f"{DOMAIN}/revision"
"""Label of such a pod, and of our OpenFaaS provider's: the revision of the function."""
KNATIVE_SERVICE_LABEL, KNATIVE_REVISION_LABEL = "serving.knative.dev/service", "serving.knative.dev/revision"
OPENFAAS_LABEL = "faas_function"
TENANT_LABEL = f"{DOMAIN}/tenant"
"""Label of a namespace: whose functions are in it; without it the namespace is its own tenant."""
SNAPSHOTS_LABEL = f"{DOMAIN}/snapshots"
"""Label of a namespace that lets functions keep snapshots on nodes, with the rights that CRIU needs: ``enabled``."""
TASK_LABEL = f"{DOMAIN}/task"
"""Label of pods of ours that are no function's replicas; its value is `adapter.replica.TASK_SNAPSHOT`. An admission policy
keeps it for the controller."""
SNAPSHOT_OF_ANNOTATION, SNAPSHOT_REVISION_ANNOTATION = f"{DOMAIN}/snapshot-of", f"{DOMAIN}/snapshot-of-revision"
"""Of such a pod, the snapshot's name, ``tenant/name.namespace``, and the function's revision."""
PATCHED_ANNOTATION = f"{DOMAIN}/patched"
"""Hash of what the pod webhook put into a pod: there, it has nothing left to do."""
PLACEMENT_ANNOTATION = f"{DOMAIN}/placement"
"""Why the pod webhook chose the nodes it prefers, as compact JSON: for ``gpufn explain``."""
ADMITTED_ANNOTATION = f"{DOMAIN}/admitted-at"
"""When the pod webhook saw a pod, in nanoseconds since the epoch: Kubernetes' own times are whole seconds."""
DERIVED_ANNOTATION = f"{DOMAIN}/derived"
"""On a Knative Service: what we have put into its template, by which we know it from what its user did."""
OWN_ANNOTATIONS = frozenset(
    {PATCHED_ANNOTATION, PLACEMENT_ANNOTATION, ADMITTED_ANNOTATION, DERIVED_ANNOTATION, f"{DOMAIN}/status"}
)
"""Written by us: what users write is a key of `adapter.spec.FIELDS`."""
NVIDIA_GPU = "nvidia.com/gpu"
NODE_CRIU_PATH, LENT_CRIU_PATH = "/var/lib/gpufn/criu", "/opt/gpufn/lent-criu"
"""Where the agent keeps a CRIU on its node, and where a container sees it."""
SECCOMP_PROFILE = "gpufn.json"
"""The agent's copy of our profile, below the kubelet's folder of profiles."""

LEDGER_TOKEN_HEADER = "X-Gpufn-Token"  # noqa: S105  # a name
"""On requests to the ledger through the API server, which keeps the usual header for itself: a token for the ledger."""

# Environment between a host and the entrypoint: see `adapter.replica.ReplicaSettings`.
ENV_PREFIX = "GPUFN_"

# Files of a state folder that the gateway writes and the command line reads.
USER_FILE, PASSWORD_FILE = "basic-auth-user", "basic-auth-password"
GATEWAY_FILE = "gateway"
"""The address of the gateway that runs over this folder."""

# Environment of the command line.
ENV_HOME = "GPUFN_HOME"
"""State folder of `gpufn up`; default: $XDG_STATE_HOME/gpufn, that is ~/.local/state/gpufn."""
ENV_CRIU = "GPUFN_CRIU"
"""Path of the CRIU to use; default: the first that works of PATH and the private folder."""
