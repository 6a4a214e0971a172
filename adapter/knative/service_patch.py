"""What the webhook puts into a Knative Service's template, from the annotations of ours that the Service has.

Pure and deterministic: the same Service becomes the same template, so no Revision appears by itself. An update that
leaves the template and our annotations alone leaves all of it alone, whatever another version of this would have made.

What we put there is remembered on the Service (`DERIVED_ANNOTATION`): it follows the annotations that it came from, and
goes with them. Whatever else the template says is its user's, wins, and stays. `func` wipes annotations at each
deploy, so the Service as it was before is asked too.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter.cluster.intent import Intent, read_intent
from adapter.cluster.inventory import is_gpu
from adapter.cluster.json_patch import Editor, Path, pointer
from adapter.errors import ConfigError
from adapter.keys import DERIVED_ANNOTATION, DOMAIN, NVIDIA_GPU, OWN_ANNOTATIONS
from adapter.knative.autoscaling import (
    INITIAL_SCALE,
    MAX_SCALE,
    MIN_SCALE,
    RETENTION,
    WINDOW,
    Defaults,
    keep_alive,
    reach_s,
    said,
    scale_said,
)
from adapter.units import format_duration, parse_duration_s

PROGRESS_DEADLINE = "serving.knative.dev/progress-deadline"
_USUAL_DEADLINE_S = 600
"""Knative's own."""
_NODE_AND_IMAGE_S = 300
"""What the usual deadline leaves beside the usual start: for a node that must be made, and for pulling the image."""

_TEMPLATE = ("spec", "template")


@dataclass(frozen=True, slots=True)
class ServicePatch:
    """JSON Patch `operations`, none where nothing is to be done, and `warnings` for whoever wrote the Service."""

    operations: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


def patch_service(
    service: Mapping[str, Any],
    old: Mapping[str, Any] | None,
    *,
    namespace: str,
    namespace_labels: Mapping[str, str],
    defaults: Defaults,
) -> ServicePatch:
    """What makes of `service` what its annotations say; `old` is what it was before an update.

    Raises `ConfigError` where they contradict each other or cannot be used.
    """
    if old is not None and _asked(service) == _asked(old):
        return ServicePatch()
    edit = Editor(service)
    record = _record(service) or _record(old or {})
    mine = {path: value for path, value in record.items() if edit.get(*_TEMPLATE, *path) == value}
    template = _without(edit.get(*_TEMPLATE) or {}, mine)
    work = _Derived.of(service, template, namespace, namespace_labels, defaults)
    if _keeps_its_name(service, old):
        return _as_before(edit, record, work)
    for path in [path for path in mine if path not in work.values]:
        edit.remove((*_TEMPLATE, *path))
        if str(path[-1]).startswith(f"{DOMAIN}/"):  # whoever moved it, unchanged, shall know
            work.warnings.append(f"{path[-1]} is no longer on the Service, and with it goes from the template")
    for path, value in work.values.items():
        edit.put((*_TEMPLATE, *path), value)
    _remember(edit, work.values)
    return ServicePatch(tuple(edit.operations), tuple(work.warnings))


def _as_before(edit: Editor, record: Mapping[Path, Any], work: _Derived) -> ServicePatch:
    """Of a template that keeps the name its user gave it: Knative refuses any other change than none at all."""
    for path, value in record.items():
        if edit.get(*_TEMPLATE, *path) is None:
            edit.put((*_TEMPLATE, *path), value)
    _remember(edit, record)
    warnings = list(work.warnings)
    if record != work.values:
        name = edit.get(*_TEMPLATE, "metadata", "name")
        warnings.append(f"gpufn.dev annotations have no effect before the template's name, {name}, is changed as well")
    return ServicePatch(tuple(edit.operations), tuple(warnings))


def _annotation(key: str) -> Path:
    return "metadata", "annotations", key


# What was there ---------------------------------------------------------------------------------


def _annotations(of: Mapping[str, Any] | None) -> dict[str, str]:
    return dict(((of or {}).get("metadata") or {}).get("annotations") or {})


def _asked(service: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that the template is made of."""
    ours = {name: text for name, text in _annotations(service).items() if name.startswith(f"{DOMAIN}/")}
    return (service.get("spec") or {}).get("template"), ours


def _keeps_its_name(service: Mapping[str, Any], old: Mapping[str, Any] | None) -> bool:
    names = [((of.get("spec") or {}).get("template") or {}).get("metadata") or {} for of in (service, old or {})]
    return bool(names[0].get("name")) and names[0].get("name") == names[1].get("name")


def _record(service: Mapping[str, Any]) -> dict[Path, Any]:
    """What we put into the template, by path; nothing where that cannot be read: then it is the user's."""
    try:
        found = json.loads(_annotations(service).get(DERIVED_ANNOTATION, "{}"))
        return {_path(name): value for name, value in found.items()}
    except (ValueError, AttributeError):
        return {}


def _path(text: str) -> Path:
    parts = [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _remember(edit: Editor, values: Mapping[Path, Any]) -> None:
    path = _annotation(DERIVED_ANNOTATION)
    if values:
        text = json.dumps(
            {pointer(of): value for of, value in sorted(values.items(), key=lambda item: pointer(item[0]))}
        )
        edit.put(path, text)
    else:
        edit.remove(path)


def _without(template: Mapping[str, Any], mine: Mapping[Path, Any]) -> dict[str, Any]:
    """The template as its user wrote it."""
    edit = Editor(template)
    for path in mine:
        edit.remove(path)
    return dict(edit.document)


# What it becomes --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Derived:
    """`values` by their path in the template. `theirs` are the template's annotations, ours copied in beside."""

    template: Mapping[str, Any]
    theirs: dict[str, str]
    defaults: Defaults
    values: dict[Path, Any]
    warnings: list[str]

    @classmethod
    def of(
        cls,
        service: Mapping[str, Any],
        template: dict[str, Any],
        namespace: str,
        namespace_labels: Mapping[str, str],
        defaults: Defaults,
    ) -> _Derived:
        theirs = _annotations(template)
        copied = {
            name: text
            for name, text in _annotations(service).items()
            if name.startswith(f"{DOMAIN}/") and name not in OWN_ANNOTATIONS and name not in theirs
        }
        whole = copy.deepcopy(template)
        whole["metadata"] = {**(whole.get("metadata") or {}), "annotations": {**theirs, **copied}}
        name = (service.get("metadata") or {}).get("name") or (service.get("metadata") or {}).get("generateName", "")
        intent = read_intent(
            whole, namespace=namespace, namespace_labels=namespace_labels, function=name, framework="knative"
        )
        work = cls(template, {**theirs, **copied}, defaults, {}, [])
        if intent is not None:
            work.values = {_annotation(key): text for key, text in copied.items()}
            work.warnings += intent.notes
            work._gpu(intent)
            work._scale(intent)
            work._idle(intent)
            work._times(intent)
        return work

    def _annotate(self, key: str, text: str) -> None:
        if said(self.theirs, key) is None:
            self.values[_annotation(key)] = text

    def _spec(self, name: str) -> Any:
        return (self.template.get("spec") or {}).get(name)

    def _gpu(self, intent: Intent) -> None:
        """Whole GPUs, for all to see. What a part of one is called, only the node knows that it comes from."""
        spec = intent.spec
        container = self.template["spec"]["containers"][intent.container]
        limits = (container.get("resources") or {}).get("limits") or {}
        if spec.gpus >= 1 and not spec.mig_profile and not any(map(is_gpu, limits)):
            path = ("spec", "containers", intent.container, "resources", "limits", NVIDIA_GPU)
            self.values[path] = str(int(spec.gpus))

    def _scale(self, intent: Intent) -> None:
        spec, asked = intent.spec, intent.asked
        if "max_replicas" in asked:
            self._annotate(MAX_SCALE, str(spec.max_replicas))
        if "min_replicas" in asked and spec.min_replicas != self.defaults.min_scale:
            self._annotate(MIN_SCALE, str(spec.min_replicas))
        least, most = (self._scale_of(key) for key in (MIN_SCALE, MAX_SCALE))
        if least and most and least > most:
            raise _contradiction(f"{MIN_SCALE} = {least}", f"{MAX_SCALE} = {most}", "The least cannot exceed the most.")
        if "initial_replicas" in asked:
            if spec.initial_replicas or self.defaults.allows_initial_zero:
                self._annotate(INITIAL_SCALE, str(spec.initial_replicas))
            else:
                self.warnings.append(
                    f"{DOMAIN}/initial = 0 has no effect: config-autoscaler does not allow it (allow-zero-initial-scale)"
                )
        if "in_flight" in asked and self._spec("containerConcurrency") is None:
            self.values["spec", "containerConcurrency"] = spec.in_flight
        elif "in_flight" in asked and self._spec("containerConcurrency") != spec.in_flight:
            self.warnings.append(
                f"containerConcurrency: {self._spec('containerConcurrency')} stays; a replica handles {spec.in_flight} "
                f"requests at once ({DOMAIN}/in-flight)"
            )

    def _scale_of(self, key: str) -> int | None:
        """As it will be."""
        ours = self.values.get(_annotation(key))
        return scale_said(self.theirs, key) if ours is None else int(ours)

    def _idle(self, intent: Intent) -> None:
        """A time that the user set. One that is to be learned is the tuner's, on Revisions."""
        idle_s = intent.spec.idle_s
        if "idle_s" not in intent.asked or idle_s is None:
            return
        if not idle_s:
            self._annotate(MIN_SCALE, "1")
            return
        if said(self.theirs, RETENTION) is not None:
            self.warnings.append(f"{DOMAIN}/idle has no effect: {RETENTION} is set in the template, and wins")
            return
        for key, text in keep_alive(idle_s, self.defaults, self.theirs).items():
            self._annotate(key, text)
        if said(self.theirs, WINDOW) is not None and idle_s < (window_s := parse_duration_s(self.theirs[WINDOW])):
            self.warnings.append(
                f"{DOMAIN}/idle = {format_duration(idle_s)} is less than the window in the template, "
                f"{format_duration(window_s)}, which wins"
            )
        if idle_s > (longest_s := reach_s(self.defaults, self.theirs)):
            self.warnings.append(
                f"{DOMAIN}/idle is longer than Knative knows, {format_duration(longest_s)}: "
                f"gpufn's controller keeps a replica for the rest"
            )

    def _times(self, intent: Intent) -> None:
        """Whoever calls at zero waits for a start, and then for an answer: Knative gives up after the sum, at most."""
        spec = intent.spec
        self._deadline(spec.start_timeout_s, is_asked="start_timeout_s" in intent.asked)
        longest_s = self.defaults.longest_timeout_s
        needed_s = math.ceil(spec.start_timeout_s + spec.exec_timeout_s) if spec.exec_timeout_s else longest_s
        if needed_s > longest_s and {"start_timeout_s", "exec_timeout_s"} & intent.asked:
            self.warnings.append(
                f"a request that waits for a start may need {needed_s}s, and gets {longest_s}s: raise "
                f"max-revision-timeout-seconds in config-defaults"
            )
        needed_s = min(needed_s, longest_s)
        there = self._spec("timeoutSeconds")
        if not there:
            self.values["spec", "timeoutSeconds"] = needed_s
            if self._spec("responseStartTimeoutSeconds") is None:
                self.values["spec", "responseStartTimeoutSeconds"] = needed_s
        elif there < needed_s and {"start_timeout_s", "exec_timeout_s"} & intent.asked:
            self.warnings.append(
                f"timeoutSeconds: {there} stays; a request that waits for a start may need {needed_s}s "
                f"({DOMAIN}/start-timeout and {DOMAIN}/exec-timeout)"
            )

    def _deadline(self, start_s: float, *, is_asked: bool) -> None:
        theirs = self.theirs.get(PROGRESS_DEADLINE)
        if theirs is None:
            needed_s = math.ceil(start_s) + _NODE_AND_IMAGE_S
            if needed_s > _USUAL_DEADLINE_S:
                self.values[_annotation(PROGRESS_DEADLINE)] = f"{needed_s}s"
            return
        try:
            deadline_s = parse_duration_s(theirs)
        except ValueError:
            return  # Knative says so
        if is_asked and deadline_s < start_s:
            raise _contradiction(
                f"{PROGRESS_DEADLINE} = {theirs}",
                f"{DOMAIN}/start-timeout = {format_duration(start_s)}",
                "Knative would call the Revision failed while it may still start.",
            )


def _contradiction(one: str, other: str, why: str) -> ConfigError:
    return ConfigError(
        f"{one} and {other} contradict each other.", why=why, hint="Change one of them.", code="contradiction"
    )
