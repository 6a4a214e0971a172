"""Settings of the provider on a cluster: flags, and under them variables of its environment. (Components that have no flags
read theirs by `adapter.settings`.)"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from adapter.errors import ConfigError
from adapter.settings import as_log_level, as_port

PULL_POLICIES = ("", "Always", "IfNotPresent", "Never")
_YES, _NO = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off", ""})


def _switch(text: str) -> bool:
    if text.lower() in _YES | _NO:
        return text.lower() in _YES
    raise ValueError("true or false")


def _policy(text: str) -> str:
    if text not in PULL_POLICIES:
        raise ValueError(f"one of {', '.join(PULL_POLICIES[1:])}, or nothing")
    return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _setting(flag: str, variable: str, parse: Any, default: Any, doc: str) -> Any:
    return field(default=default, metadata={"flag": flag, "variable": variable, "parse": parse, "doc": doc})


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """Each field: a flag, a variable under it, its default, and what it says."""

    address: str = _setting("--listen", "GPUFN_LISTEN", str, "0.0.0.0", "address to listen on")  # noqa: S104  # a pod's
    port: int = _setting("--port", "GPUFN_PORT", as_port, 8080, "port of the gateway; 0 takes a free one")
    status_port: int = _setting("--status-port", "GPUFN_STATUS_PORT", as_port, 8081, "port of metrics and probes")
    state: str = _setting("--state", "GPUFN_HOME", str, "/var/run/gpufn", "folder of accepted asynchronous invocations")
    credentials: str = _setting(
        "--credentials", "secret_mount_path", str, "/var/run/secrets/gpufn.dev/auth",
        "folder with basic-auth-user and basic-auth-password, as OpenFaaS mounts them",
    )  # fmt: skip
    auth: bool = _setting("--basic-auth", "basic_auth", _switch, True, "ask deployers for user and password")
    pull_policy: str = _setting(
        "--image-pull-policy", "image_pull_policy", _policy, "", "of functions' images; nothing: Kubernetes' default"
    )
    insecure_registries: tuple[str, ...] = _setting(
        "--insecure-registries", "GPUFN_INSECURE_REGISTRIES", _words, (), "hosts of registries without TLS"
    )
    callback_hosts: tuple[str, ...] = _setting(
        "--callback-hosts", "GPUFN_CALLBACK_HOSTS", _words, (),
        "hosts that answers may be sent to though they are this machine, or on its link",
    )  # fmt: skip
    function_role: str = _setting(
        "--function-role", "GPUFN_FUNCTION_ROLE", str, "",
        "ClusterRole to bind to ourselves in a namespace that is made through us; nothing: none",
    )  # fmt: skip
    service_account: str = _setting(
        "--service-account", "GPUFN_SERVICE_ACCOUNT", str, "gpufn-provider", "our own, in our own namespace"
    )
    kubeconfig: str = _setting(
        "--kubeconfig", "", str, "", "of the cluster; without it as kubectl does, in a pod its service account"
    )
    log_level: str = _setting("--log-level", "GPUFN_LOG_LEVEL", as_log_level, "info", "debug, info, warning or error")

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], environ: Mapping[str, str]) -> ProviderSettings:
        """Raises `ConfigError` naming the flag or variable; `SystemExit` for ``--help`` and flags that are none."""
        parser = argparse.ArgumentParser(
            prog="python -m adapter.openfaas",
            description="The OpenFaaS provider and gateway over the pods of a cluster.",
            allow_abbrev=False,
        )
        for item in fields(cls):
            flag, variable, doc = (item.metadata[name] for name in ("flag", "variable", "doc"))
            named = f" [{variable}]" if variable else ""
            default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
            shown = f" (default: {str(default).lower() if isinstance(default, bool) else default})" if default else ""
            parser.add_argument(flag, dest=item.name, metavar="VALUE", help=f"{doc}{named}{shown}")
        given = vars(parser.parse_args(arguments))
        values = {}
        for item in fields(cls):
            flag, variable = item.metadata["flag"], item.metadata["variable"]
            sources = ((flag, given[item.name]), (variable, environ.get(variable) if variable else None))
            where, text = next(((name, text) for name, text in sources if text is not None), ("", None))
            if text is not None:
                values[item.name] = _parsed(item.metadata["parse"], where, text)
        return cls(**values)


def _parsed(parse: Any, where: str, text: str) -> Any:
    try:
        return parse(text)
    except ValueError as exc:
        raise ConfigError(f"{where}={text!r} cannot be used.", hint=f"Accepted: {exc}.", code="bad-setting") from exc
