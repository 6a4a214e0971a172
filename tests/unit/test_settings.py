from dataclasses import dataclass
from pathlib import Path

import pytest

from adapter.errors import ConfigError
from adapter.settings import as_log_level, as_path, as_port, as_text, from_environment, required, variable


@dataclass(frozen=True, slots=True)
class Settings:
    name: str = required("GPUFN_NAME", as_text, "its name")
    port: int = variable("GPUFN_PORT", as_port, 8080, "where it listens")
    folder: Path = variable("GPUFN_FOLDER", as_path, Path("/there"), "where it writes")
    level: str = variable("GPUFN_LEVEL", as_log_level, "info", "how much it says")
    note: str = variable("GPUFN_NOTE", str, "none", "anything")


def read(**environ):
    return from_environment(Settings, {"GPUFN_NAME": "a", **environ})


def test_what_is_not_set_is_the_default():
    assert read() == Settings("a")


def test_what_is_set_is_read():
    found = read(GPUFN_PORT="0", GPUFN_FOLDER="/here", GPUFN_LEVEL="DEBUG", GPUFN_NOTE="", OTHER="x")
    assert found == Settings("a", 0, Path("/here"), "DEBUG", "")


@pytest.mark.parametrize(
    ("name", "text"),
    [("GPUFN_PORT", text) for text in ("", "-1", "65536", "http", "²", "80.0")]
    + [("GPUFN_FOLDER", ""), ("GPUFN_LEVEL", "loud"), ("GPUFN_NAME", "")],
)
def test_what_cannot_be_used_is_named_with_what_can(name, text):
    with pytest.raises(ConfigError) as refused:
        read(**{name: text})
    assert f"{name}={text!r}" in refused.value.message
    assert refused.value.hint.startswith("Accepted: ")


def test_what_has_to_be_set_is_named_with_what_it_says():
    with pytest.raises(ConfigError, match="GPUFN_NAME is not set") as refused:
        from_environment(Settings, {})
    assert "its name" in refused.value.why
