"""What faas-cli is asked to do, and against what: the same for recording and for the end-to-end test."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.replicas import FakeHost, Running, until

CREDENTIALS = ("admin", "a-password-of-tests")
FUNCTIONS = ("echo", "other")

STACK = """\
version: 1.0
provider:
  name: openfaas
  gateway: http://127.0.0.1:8080
functions:
  other:
    lang: dockerfile
    handler: ./other
    image: ghcr.io/me/other:0.3
    environment:
      color: blue
    secrets: [token]
    labels:
      team: ml
      com.openfaas.scale.max: 3
    annotations:
      gpufn.dev/idle: 10m
    limits: {memory: 512Mi}
    constraints: ["gpu=true"]
"""

LOG_LINES = (
    {"timestamp": "2026-01-02T03:04:05.678901+00:00", "instance": "echo-1", "text": "loading"},
    {"timestamp": "2026-01-02T03:04:06+00:00", "instance": "echo-1", "text": "ready"},
)


@dataclass(frozen=True)
class Step:
    """One call of faas-cli: what it must print, and how it must end."""

    name: str
    arguments: tuple[str, ...]
    says: tuple[str, ...] = ()
    stdin: str = ""
    code: int = 0


def step(name: str, command: str, *says: str, **options: object) -> Step:
    return Step(name, tuple(command.split()), says, **options)  # type: ignore[arg-type]


STEPS = (
    step("login", "login --password-stdin", "credentials saved for admin", stdin=CREDENTIALS[1]),
    step("login-wrong", "login -u admin -p wrong", "Unable to login", code=1),
    step("version", "version --warn-update=false", "name:          gpufn", "orchestration: process"),
    step("ready-gateway", "ready --interval 10ms", "OpenFaaS gateway is ready"),
    step("list-empty", "list", "Function"),
    step("secret-create", "secret create token --from-literal s3cret", "Created: 202"),
    step("secret-create-again", "secret create token --from-literal other", "already exists"),
    step("secret-list", "secret list", "token"),
    step("secret-update", "secret update token --from-literal n3w", "Updated: 202"),
    step("secret-update-missing", "secret update absent --from-literal x", "unable to find secret: absent"),
    step(
        "deploy",
        "deploy --name echo --image ghcr.io/me/echo:1.2@sha256:0000000000000000000000000000000000000000000000000000000000000000"
        " --env greeting=hello --label team=ml --annotation gpufn.dev/idle=10m --secret token --memory-limit 256Mi"
        " --constraint gpu=true --readonly",
        "202",
    ),
    step(
        "deploy-again",
        "deploy --name echo --image echo:1.3 --env greeting=hello --annotation gpufn.dev/in-flight=4",
        "202",
    ),
    step("deploy-replace", "deploy --name echo --image echo:1.4 --update=false --replace", "202"),
    step("deploy-unknown-image", "deploy --name absent --image absent:1", "No function folder", "echo, other", code=1),
    step("deploy-missing-secret", "deploy --name other --image other --secret absent", "do not exist: absent", code=1),
    step("deploy-bad-name", "deploy --name Echo --image echo", "lower-case", code=1),
    step(
        "deploy-bad-annotation",
        "deploy --name other --image other --annotation gpufn.dev/idl=1",
        "gpufn.dev/idle",
        code=1,
    ),
    step("deploy-stack", "deploy -f ml/stack.yaml", "202"),
    step("list", "list", "echo", "other"),
    step("list-verbose", "list -v", "echo:1.4", "ghcr.io/me/other:0.3"),
    step("list-quiet", "list -q", "echo\nother\n"),
    step("describe", "describe other", "Status:", "Ready", "ghcr.io/me/other:0.3", "team"),
    step("describe-missing", "describe absent", "No such function: absent", code=1),
    step("ready", "ready echo --interval 10ms", "is ready"),
    step("invoke", "invoke echo --content-type application/json", '{"a": 1}', stdin='{"a": 1}'),
    step("invoke-get", "invoke echo --method GET --query q=1 --header X-Own=2"),
    step("invoke-async", "invoke echo --async", "submitted asynchronously", stdin="later"),
    step("invoke-missing", "invoke absent", "404", stdin="x", code=1),
    step("logs", "logs echo --tail=false", "loading", "ready"),
    step("logs-lines", "logs echo --tail=false --lines 1 --since-time 2026-01-01T00:00:00Z --instance --name", "ready"),
    step("namespaces", "namespaces", "openfaas-fn"),
    step("namespace-create", "namespace create second --label a=b", "Namespace Created: second"),
    step("namespace-list", "namespace list", "openfaas-fn", "second"),
    step("namespace-get", "namespace get second", "second"),
    step("namespace-update", "namespace update second --label a=c", "Namespace Updated: second"),
    step("deploy-namespace", "deploy --name echo --image echo --namespace second", "202"),
    step("list-namespace", "list -n second", "echo"),
    step("remove-namespaced", "remove echo -n second", "Removing"),
    step("namespace-remove", "namespace remove second", stdin="y\n"),
    step("remove", "remove echo", "Removing"),
    step("remove-stack", "remove -f ml/stack.yaml", "Removing"),
    step("remove-missing", "remove echo", "No existing function to remove", code=1),
    step("secret-remove", "secret remove token", "Removed"),
    step("secret-remove-missing", "secret remove token", "Unable to find secret: token", code=1),
)

GATEWAY_STEPS = (
    *(each for each in STEPS if each.name not in ("login-wrong", "version", "invoke-async")),
    # It makes an answer of its own of the provider's, and does not find the name in it.
    step("version", "version --warn-update=false", "orchestration: process", "version:       0.1.0"),
    step("deploy-at-zero", "deploy --name other --image ghcr.io/me/other:0.3 --annotation gpufn.dev/initial=0", "202"),
    step("invoke-at-zero", "invoke other --content-type text/plain", "awake", stdin="awake"),
)
"""Through a stock gateway: it asks for the password, wakes functions itself, too, and has a queue of its own or none."""


def fake_host(state: Path) -> FakeHost:
    """The host of the scenario: two functions that come up at once, and a log."""
    logs = state / "logs"
    logs.mkdir(mode=0o700)
    (logs / "echo.openfaas-fn.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG_LINES))
    return FakeHost(state, functions=FUNCTIONS)


async def settled(up: Running) -> None:
    """Between two steps: what the last one began is over."""

    def is_over() -> bool:
        return all(
            not fleet.rollout.status and fleet.available == fleet.desired == len(fleet.members)
            for fleet in up.gateway.fleets.values()
        )

    await until(is_over)


def faas_cli() -> str | None:
    """The real binary, where there is one."""
    return os.environ.get("FAAS_CLI") or shutil.which("faas-cli")


async def run_step(binary: str, step: Step, url: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of one call; `folder` is its home and where it runs."""
    (folder / "ml").mkdir(exist_ok=True)  # one beside us would be read unasked
    (folder / "ml" / "stack.yaml").write_text(STACK)
    process = await asyncio.create_subprocess_exec(
        binary,
        *step.arguments,
        cwd=folder,
        env=_environment(url, folder),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(step.stdin.encode())
    assert process.returncode is not None
    return process.returncode, output.decode()


def _environment(url: str, folder: Path) -> Mapping[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "OPENFAAS_URL": url,
        "OPENFAAS_CONFIG": str(folder / "config"),
    }
