"""What kn is asked to do: what docs/how-to/run-under-knative.md tells, and what people do wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One call of kn: what it must print, and how it must end."""

    name: str
    arguments: tuple[str, ...]
    says: tuple[str, ...] = ()
    code: int = 0


def step(name: str, command: str, *says: str, code: int = 0) -> Step:
    return Step(name, tuple(command.split()), says, code)


STEPS = (
    step("list-empty", "service list", "No services found."),
    step(
        "create",
        "service create embed --image dev.local/echo:1 --limit nvidia.com/gpu=1",
        "Service 'embed' created to latest revision 'embed-00001'",
    ),
    step("create-again", "service create embed --image dev.local/echo:1", "already exists", code=1),
    step("list", "service list", "embed-00001"),
    step("describe", "service describe embed", "@latest (embed-00001)"),
    step(
        "update",
        "service update embed --annotation gpufn.dev/idle=6s --annotation gpufn.dev/max=3 --wait-window 120",
        "Service 'embed' updated to latest revision 'embed-00002'",
    ),
    step("describe-verbose", "service describe embed --verbose", "gpufn.dev/max=3", "0 ... 3"),
    step(
        "create-misspelt",
        "service create other --image dev.local/echo:1 --annotation gpufn.dev/gpu=1 --annotation gpufn.dev/modles=a100",
        "Did you mean gpufn.dev/models?",
        code=1,
    ),
    step(
        "update-bad-value", "service update embed --annotation gpufn.dev/idle=soon", "Write auto, or a duration", code=1
    ),
    step("revision-list", "revision list", "embed-00001", "embed-00002"),
    step("revision-describe", "revision describe embed-00002", "autoscaling.knative.dev/max-scale=3"),
    step("split", "service update embed --traffic embed-00001=10,@latest=90", "Ready to serve."),
    step("route-list", "route list", "embed"),
    step(
        "create-named",
        "service create named --image dev.local/echo:1 --revision-name named-one --annotation gpufn.dev/max=2",
        "Service 'named' created to latest revision 'named-one'",
    ),
    step(
        "update-named",
        "service update named --annotation gpufn.dev/max=3",
        "have no effect before the template's name, named-one, is changed",
        code=1,
    ),
    step("apply", "service apply applied --image dev.local/echo:1 --annotation gpufn.dev/idle=6s", "Ready to serve."),
    step("apply-without", "service apply applied --image dev.local/echo:1", "Ready to serve."),
    step("delete", "service delete embed named applied", "Service 'embed' successfully deleted"),
    step("delete-missing", "service delete absent", "not found", code=1),
)
