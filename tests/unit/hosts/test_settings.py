from pathlib import Path

import pytest

from adapter.errors import ConfigError
from adapter.hosts import Deployment
from adapter.hosts.process import check_deployment, environment_of, settings_of
from adapter.replica import ReplicaSettings
from adapter.spec import parse_spec


def deployment(annotations=None, *, name="embed", namespace="openfaas-fn", secrets=(), **env) -> Deployment:
    spec = parse_spec({}, annotations or {})
    return Deployment(name, namespace, "1", "embed:1", spec, tuple(env.items()), secrets)


def test_the_spec_reaches_the_replica():
    settings = settings_of(
        deployment({"gpufn.dev/in-flight": "3", "gpufn.dev/exec-timeout": "7s", "gpufn.dev/body": "1Mi"})
    )
    assert (settings.in_flight, settings.exec_timeout_s, settings.body_limit_bytes) == (3, 7.0, 2**20)
    assert settings.metrics_port == 0


def test_watchdog_variables_win_over_the_spec():
    settings = settings_of(
        deployment({"gpufn.dev/in-flight": "3"}, exec_timeout="5s", max_inflight="2", read_timeout="9")
    )
    assert (settings.exec_timeout_s, settings.in_flight, settings.read_timeout_s) == (5.0, 2, 9.0)


def test_a_drain_lets_a_request_have_its_time():
    assert settings_of(deployment(exec_timeout="5m")).write_timeout_s == 300.0
    assert settings_of(deployment(exec_timeout="5m", write_timeout="1s")).write_timeout_s == 1.0
    assert settings_of(deployment(exec_timeout="0")).write_timeout_s > 0


def test_at_least_the_requests_of_a_full_replica_are_held_while_it_starts():
    assert settings_of(deployment({"gpufn.dev/queue": "0", "gpufn.dev/in-flight": "4"})).held >= 4


def test_what_is_said_is_what_is_read():
    settings = settings_of(deployment(exec_timeout="5s", WHO="me"))
    assert (
        ReplicaSettings.from_env(environment_of(deployment(exec_timeout="5s", WHO="me"), settings, Path("/shim")))
        == settings
    )


def test_the_hosts_own_variables_stay_with_it(monkeypatch):
    monkeypatch.setenv("HOST_TOKEN", "not for functions")
    monkeypatch.setenv("PYTHONPATH", "/host/libraries")
    monkeypatch.setenv("TZ", "UTC")
    env = environment_of(deployment(WHO="me"), settings_of(deployment()), Path("/shim"))
    assert "HOST_TOKEN" not in env
    assert (env["WHO"], env["TZ"], env["PYTHONPATH"]) == ("me", "UTC", "/shim")


def test_a_function_may_extend_the_python_path_but_not_lose_the_shim():
    env = environment_of(deployment(PYTHONPATH="/function/lib"), settings_of(deployment()), Path("/shim"))
    assert env["PYTHONPATH"] == "/shim:/function/lib"


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../up"},
        {"name": ""},
        {"namespace": "a/b"},
        {"namespace": ".."},
        {"secrets": ("../../basic-auth-password",)},
        {"secrets": ("a\0b",)},
        {"secrets": ("a..b",)},
        {"GPUFN_SNAPSHOT_DIR": "/elsewhere"},
        {"a\0b": "x"},
        {"A": "x\0y"},
        {"a=b": "x"},
        {"exec_timeout": "soon"},
        {"BIG": "x" * 200_000},
    ],
)
def test_names_and_variables_that_cannot_be_used_are_refused(wrong):
    with pytest.raises(ConfigError):
        check_deployment(deployment(**wrong))


def test_ordinary_deployments_pass():
    check_deployment(deployment(secrets=("api-key", "db.password", "A_1"), WHO="me", exec_timeout="5s", PORT="9000"))


def test_a_replica_sees_the_gpus_that_it_was_given_and_no_other(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    wanted = deployment({"gpufn.dev/gpu": "2"}, CUDA_VISIBLE_DEVICES="all")
    settings = settings_of(wanted, ("GPU-7", "GPU-8"))
    assert (settings.device, settings.resume) == ("cuda:0", "asked")
    assert environment_of(wanted, settings, Path("/shim"), ("GPU-7", "GPU-8"))["CUDA_VISIBLE_DEVICES"] == "GPU-7,GPU-8"


def test_a_function_without_a_gpu_sees_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    settings = settings_of(deployment())
    assert (settings.device, settings.resume) == ("cpu", "held")
    assert environment_of(deployment(), settings, Path("/shim"))["CUDA_VISIBLE_DEVICES"] == ""


def test_without_a_ledger_of_grants_a_gpu_function_sees_what_the_machine_shows(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    wanted = deployment({"gpufn.dev/gpu": "1"})
    settings = settings_of(wanted)
    assert (settings.device, settings.resume) == ("", "held")
    assert environment_of(wanted, settings, Path("/shim"))["CUDA_VISIBLE_DEVICES"] == "1"
