"""OpenFaaS's JSON on the wire, to and from our values. Names are those of openfaas/faas-provider ``types/``."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adapter.cluster.intent import policy_of
from adapter.cluster.inventory import is_gpu
from adapter.errors import ConfigError, NotFound, Unavailable
from adapter.keys import DOMAIN

DEFAULT_NAMESPACE = "openfaas-fn"
STATUS_ANNOTATION = f"{DOMAIN}/status"
"""``<state>: <why>`` of a function that cannot serve yet, or not at all, or ``note: …``; ignored in a deploy."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_WIRE_NAMES = {
    "env_process": "envProcess",
    "env_vars": "envVars",
    "read_only_root_filesystem": "readOnlyRootFilesystem",
}
_SECRET_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class FunctionDeployment:
    """What a deploy sends, kept as it came: it is also what `describe` gives back."""

    service: str
    image: str
    namespace: str = DEFAULT_NAMESPACE
    env_process: str = ""
    env_vars: dict[str, str] = field(default_factory=dict)
    constraints: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)
    read_only_root_filesystem: bool = False

    @property
    def key(self) -> str:
        return f"{self.service}.{self.namespace}"

    def policy(self) -> dict[str, str]:
        """Annotations for `adapter.spec` of all that the user wrote. Raises `ConfigError` for impossible limits."""
        return self._policy()[0]

    def _policy(self) -> tuple[dict[str, str], list[str]]:
        return policy_of(
            labels=self.labels,
            annotations=self.annotations,
            limits={**self.requests, **self.limits},
            constraints=self.constraints,
        )

    def without_effect(self, *, bounded: bool) -> str:
        """What it asks for that is only kept and shown. `bounded`: limits of memory and CPU are kept where it runs."""
        names = [] if bounded else sorted(name for name in self.limits if not is_gpu(name))
        unenforced = [f"limits of {' and '.join(names)} are not enforced here"] if names else []
        try:
            return "; ".join([*unenforced, *self._policy()[1]])
        except ConfigError:  # of an earlier version, which took it; its status says so
            return "; ".join(unenforced)

    def to_json(self) -> dict[str, Any]:
        """Our own form, for the catalog."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> FunctionDeployment:
        """What `to_json` gave; it lies where others can write it. Raises `ConfigError`."""
        if not isinstance(data, dict):
            raise ConfigError("A deployment is no JSON object.", code="bad-json")
        return cls._read(data, {})

    @classmethod
    def parse(cls, body: bytes) -> FunctionDeployment:
        """A deploy's body. Unknown keys are other versions' business; raises `ConfigError` for wrong ones."""
        return cls._read(parse_object(body), _WIRE_NAMES)

    @classmethod
    def _read(cls, data: Mapping[str, Any], names: Mapping[str, str]) -> FunctionDeployment:
        """`names`: keys that are not called as the field is."""
        deployment = cls(
            service=name_in(data, "service"),
            image=_text(data, "image"),
            namespace=namespace_in(data),
            env_process=_text(data, names.get("env_process", "env_process")),
            env_vars=texts_in(data, names.get("env_vars", "env_vars")),
            constraints=_list(data, "constraints"),
            secrets=_list(data, "secrets"),
            labels=texts_in(data, "labels"),
            annotations=texts_in(data, "annotations"),
            limits=texts_in(data, "limits"),
            requests=texts_in(data, "requests"),
            read_only_root_filesystem=_switch(
                data, names.get("read_only_root_filesystem", "read_only_root_filesystem")
            ),
        )
        if not deployment.image:
            raise ConfigError("The deploy names no image.", why="`image` says which function folder to run.")
        return deployment

    def status(self, *, replicas: int, available: int, invocations: int, created_at: str, note: str) -> dict[str, Any]:
        """A FunctionStatus. `note` becomes the status annotation, beside the user's own."""
        annotations = {name: value for name, value in self.annotations.items() if name != STATUS_ANNOTATION}
        if note:
            annotations[STATUS_ANNOTATION] = note
        status: dict[str, Any] = {
            "name": self.service,
            "image": self.image,
            "namespace": self.namespace,
            "envProcess": self.env_process,
            "envVars": self.env_vars,
            "constraints": list(self.constraints),
            "secrets": list(self.secrets),
            "labels": self.labels,
            "annotations": annotations,
            "readOnlyRootFilesystem": self.read_only_root_filesystem,
            "invocationCount": invocations,
            "replicas": replicas,
            "availableReplicas": available,
            "createdAt": created_at,
        }
        if self.limits:
            status["limits"] = self.limits
        if self.requests:
            status["requests"] = self.requests
        return status


def unknown_function(key: str) -> NotFound:
    """Of ``name.namespace``."""
    return NotFound(f"No function {key}.", hint="See what is deployed: gpufn list -A", code="function-unknown")


def secret_command(verb: str, name: str, namespace: str) -> str:
    """The faas-cli line that creates or changes a secret."""
    inside = "" if namespace == DEFAULT_NAMESPACE else f" --namespace {namespace}"
    return f"faas-cli secret {verb} {name}{inside}"


def shutting_down(_key: str = "") -> Unavailable:
    return Unavailable("This gateway is shutting down.", hint="Retry.", code="draining", retry_after_s=1)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises `ConfigError`."""
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()  # half a character ("\ud800") is text that nobody can write
    except (ValueError, RecursionError) as exc:
        raise ConfigError("The request body is no JSON.", why=f"{exc}.", code="bad-json") from exc
    if not isinstance(data, dict):
        raise ConfigError("The request body is no JSON object.", code="bad-json")
    return data


def name_in(data: Mapping[str, Any], key: str) -> str:
    """A function's or namespace's name. Raises `ConfigError`."""
    name = _text(data, key)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{key} {name!r} cannot be used.",
            why="Names become host names.",
            hint="Use lower-case letters, digits and inner hyphens, at most 63.",
            code="bad-name",
        )
    return name


def namespace_in(data: Mapping[str, Any], key: str = "namespace") -> str:
    return name_in(data, key) if _text(data, key) else DEFAULT_NAMESPACE


def secret_name_in(data: Mapping[str, Any]) -> str:
    name = _text(data, "name")
    if not _SECRET_NAME.fullmatch(name):
        raise ConfigError(f"secret {name!r} cannot be used.", hint="Use letters, digits, - _ and .", code="bad-name")
    return name


def secret_value_in(data: Mapping[str, Any]) -> bytes:
    """`rawValue` as it is, else `value` as UTF-8. Raises `ConfigError`, which never shows it."""
    raw = _text(data, "rawValue")
    if not raw:
        return _text(data, "value").encode()
    try:
        return base64.b64decode(raw, validate=True)
    except ValueError as exc:
        raise ConfigError("rawValue is no base64.", code="bad-json") from exc


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{key} is no text.", code="bad-json")
    return value


def _switch(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} is neither true nor false.", code="bad-json")
    return bool(value)


def texts_in(data: Mapping[str, Any], key: str) -> dict[str, str]:
    """An object of texts; empty where there is none. Raises `ConfigError`."""
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ConfigError(f"{key} is no object of texts.", code="bad-json")
    return dict(value)


def _list(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = data.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{key} is no list of texts.", code="bad-json")
    return tuple(value)
