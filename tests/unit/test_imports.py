"""What a fresh interpreter loads: the shim must stay light, and decisions must stay pure."""

import subprocess
import sys
from pathlib import Path

import pytest

import adapter

HEAVY = {"torch", "numpy", "yaml", "requests", "rich", "sqlalchemy", "aiohttp", "kubernetes", "click", "pynvml", "cuda",
         "prometheus_client", "safetensors", "sqlite3"}  # fmt: skip
WEB = {"flask", "gunicorn", "werkzeug", "jinja2"}
VOCABULARY = ["keys", "units", "errors", "records", "replica", "spec", "logs"]


def modules_after(statement: str) -> set[str]:
    """Top-level names of the modules a fresh interpreter has after `statement`."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def submodules(package: str) -> list[str]:
    folder = Path(adapter.__file__).parent / package
    return [f"adapter.{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]


def outsiders(modules: set[str]) -> set[str]:
    """Modules that are neither ours nor the interpreter's own, nor there from the start (site hooks)."""
    return {name for name in modules - modules_after("pass") - sys.stdlib_module_names if not name.startswith("_")} - {
        "adapter"
    }


def test_package_alone_imports_nothing():
    assert modules_after("import adapter") - modules_after("pass") == {"adapter"}


def test_entrypoint_is_standard_library_only():
    assert outsiders(modules_after("import adapter.runtime.entrypoint")) == set()


@pytest.mark.parametrize("package", ["runtime", "snapshot", "gpu"])
def test_shim_loads_nothing_heavy(package):
    names = [name for name in submodules(package) if not name.endswith("__main__")]
    loaded = modules_after("import " + ", ".join(names))
    assert loaded & HEAVY == set()
    assert outsiders(loaded) <= WEB | {"click", "blinker", "itsdangerous", "markupsafe", "packaging"}


@pytest.mark.parametrize("name", VOCABULARY)
def test_vocabulary_is_standard_library_only(name):
    assert outsiders(modules_after(f"import adapter.{name}")) == set()


def test_policy_is_standard_library_only():
    assert outsiders(modules_after("import " + ", ".join(submodules("policy")))) == set()


def test_command_line_starts_without_servers_and_databases():
    loaded = modules_after("import adapter.cli.main")
    assert loaded & (HEAVY - {"click"}) == set()
