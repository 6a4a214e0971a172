"""The provider's flags and variables."""

import pytest

from adapter.errors import ConfigError
from adapter.openfaas.cluster_settings import ProviderSettings


def test_a_flag_wins_over_its_variable_and_both_over_the_default():
    environ = {"GPUFN_PORT": "9000", "basic_auth": "false", "GPUFN_INSECURE_REGISTRIES": "a:1, b:2"}
    settings = ProviderSettings.from_arguments(["--port", "9001"], environ)
    assert (settings.port, settings.auth, settings.insecure_registries) == (9001, False, ("a:1", "b:2"))
    assert settings.status_port == 8081


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--port", "many"], {}, "--port='many'"),
        ([], {"GPUFN_PORT": "70000"}, "GPUFN_PORT='70000'"),
        ([], {"image_pull_policy": "Sometimes"}, "image_pull_policy='Sometimes'"),
        (["--basic-auth", "perhaps"], {}, "--basic-auth='perhaps'"),
        (["--log-level", "loud"], {}, "--log-level='loud'"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_can(arguments, environ, named):
    with pytest.raises(ConfigError, match="cannot be used") as error:
        ProviderSettings.from_arguments(arguments, environ)
    assert named in error.value.message
    assert error.value.hint.startswith("Accepted: ")


def test_help_names_every_setting_with_its_variable(capsys):
    with pytest.raises(SystemExit):
        ProviderSettings.from_arguments(["--help"], {})
    said = " ".join(capsys.readouterr().out.split())
    for field in ProviderSettings.__dataclass_fields__.values():
        assert field.metadata["flag"] in said
        assert field.metadata["variable"] in said
