import inspect
import json

import pytest

from adapter import errors
from adapter.errors import AdapterError, ConfigError, NotFound, Overloaded

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, AdapterError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_its_codes(kind):
    assert 1 <= kind.exit_code <= 125
    assert 400 <= kind.http_status <= 599
    assert kind.default_code == kind.default_code.lower().replace("_", "-")


def test_default_codes_tell_cases_apart():
    codes = [kind.default_code for kind in CLASSES]
    assert len(set(codes)) == len(codes)


def test_every_error_is_in_the_tree_that_the_module_draws():
    assert errors.__doc__ is not None
    for kind in CLASSES:
        line = next((line for line in errors.__doc__.splitlines() if kind.__name__ in line.split()), None)
        assert line is not None, kind
        if "exit" in line:
            assert int(line.split("exit")[1].split()[0]) == kind.exit_code
            assert int(line.split("http")[1].split()[0]) == kind.http_status


def test_an_error_carries_what_why_and_what_to_do():
    error = ConfigError("No.", why="Because.", hint="Try yes.", code="no-way")
    assert str(error) == "No."
    assert json.loads(json.dumps(error.to_json())) == {
        "error": {"code": "no-way", "message": "No.", "why": "Because.", "hint": "Try yes."}
    }


def test_code_defaults_to_the_class_and_retry_is_optional():
    assert NotFound("x").code == "not-found"
    assert NotFound("x").retry_after_s is None
    assert Overloaded("x", retry_after_s=2.5).retry_after_s == 2.5
