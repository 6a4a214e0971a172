from dataclasses import fields

import pytest

from adapter.errors import ConfigError
from adapter.replica import OWN_VARIABLES, Command, ReplicaSettings, base_environment, user_environment


def test_an_empty_environment_gives_the_defaults():
    assert ReplicaSettings.from_env({}) == ReplicaSettings()


def test_every_setting_says_what_it_does_and_has_its_own_variables():
    names = [name for item in fields(ReplicaSettings) for name in item.metadata["names"]]
    assert len(names) == len(set(names))
    assert all(item.metadata["doc"] for item in fields(ReplicaSettings))


@pytest.mark.parametrize(
    ("variable", "text", "setting", "value"),
    [
        ("PORT", "9000", "port", 9000), ("port", "9000", "port", 9000), ("exec_timeout", "30", "exec_timeout_s", 30.0),
        ("exec_timeout", "1m30s", "exec_timeout_s", 90.0), ("read_timeout", "5s", "read_timeout_s", 5.0),
        ("max_inflight", "3", "in_flight", 3), ("K_SERVICE", "embed", "function", "embed"), ("log_callid", "true", "log_call_id", True),
        ("LISTEN_ADDRESS", "[::]:9000", "port", 9000), ("LISTEN_ADDRESS", ":9000", "port", 9000), ("suppress_lock", "1", "suppress_lock", True),
        ("OPENFAAS_NAMESPACE", "dev", "namespace", "dev"), ("secret_mount_path", "/s", "secrets_dir", "/s"),
    ],
)  # fmt: skip
def test_variables_of_openfaas_and_knative_are_honoured(variable, text, setting, value):
    assert getattr(ReplicaSettings.from_env({variable: text}), setting) == value


def test_our_own_name_of_a_variable_wins():
    environ = {"OPENFAAS_NAME": "theirs", "GPUFN_FUNCTION": "ours", "K_SERVICE": "k"}
    assert ReplicaSettings.from_env(environ).function == "ours"


def test_watchdogs_no_limit_becomes_a_pool_of_threads():
    assert ReplicaSettings.from_env({"max_inflight": "0"}).in_flight > 1


@pytest.mark.parametrize(
    ("environ", "queue"),
    [({"max_inflight": "3"}, 0), ({"max_inflight": "3", "GPUFN_QUEUE": "7"}, 7), ({"GPUFN_IN_FLIGHT": "3"}, 100),
     ({"max_inflight": "3", "GPUFN_IN_FLIGHT": "4"}, 100), ({"max_inflight": "0"}, 100)],
)  # fmt: skip
def test_what_is_above_watchdogs_limit_does_not_wait(environ, queue):
    assert ReplicaSettings.from_env(environ).queue == queue


def test_a_function_that_must_ask_for_tokens_is_not_served_without():
    with pytest.raises(ConfigError) as caught:
        ReplicaSettings.from_env({"jwt_auth": "true"})
    assert "jwt_auth" in caught.value.message
    ReplicaSettings.from_env({"jwt_auth": "false"})


def test_the_platforms_port_wins_over_an_address_that_the_image_brings():
    assert ReplicaSettings.from_env({"PORT": "9000", "LISTEN_ADDRESS": "[::]:8080"}).port == 9000


@pytest.mark.parametrize(
    ("variable", "text", "accepted"),
    [("PORT", "http", "a whole number"), ("LISTEN_ADDRESS", "[::]", "[::]:8080"), ("PORT", "70000", "a whole number"), ("exec_timeout", "soon", "a duration"), ("GPUFN_BODY_LIMIT", "big", "a size"),
     ("log_callid", "maybe", "true or false")],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(variable, text, accepted):
    with pytest.raises(ConfigError) as caught:
        ReplicaSettings.from_env({variable: text})
    assert variable in caught.value.message
    assert accepted in caught.value.hint


def test_the_users_environment_is_neither_ours_nor_the_machines():
    environ = {"PATH": "/bin", "PORT": "1", "exec_timeout": "1", "GPUFN_ANYTHING": "1", "TOKEN": "t", "MODEL": "m"}
    assert user_environment(environ) == {"TOKEN": "t", "MODEL": "m"}
    assert base_environment(environ) == {"PATH": "/bin"}


def test_own_variables_are_those_the_settings_read():
    assert {"PORT", "GPUFN_LISTEN_FD", "exec_timeout"} <= OWN_VARIABLES


@pytest.mark.parametrize("devices", [("GPU-1",), ("GPU-1", "GPU-2"), ("MIG-3",)])
def test_a_resume_line_names_its_devices(devices):
    line = Command.resume(devices)
    assert line.startswith(Command.RESUME)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Command.devices_in(line) == devices


def test_a_folder_mounted_at_the_documented_place_is_the_store(tmp_path):
    def found(environ, mounted):
        return ReplicaSettings.from_env(environ, mounted=str(mounted)).snapshot_dir

    assert found({}, tmp_path) == str(tmp_path)
    assert found({}, tmp_path / "not-mounted") == ""
    assert found({"GPUFN_SNAPSHOT_DIR": ""}, tmp_path) == ""
    assert found({"GPUFN_SNAPSHOT_DIR": "/mine"}, tmp_path) == "/mine"
    (tmp_path / "file").touch(mode=0o700)
    assert found({}, tmp_path / "file") == ""
