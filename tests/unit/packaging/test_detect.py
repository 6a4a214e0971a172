"""Which folders the buildpack takes, by its own scripts: exit codes as the specification has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapter.packaging.assemble import assemble
from adapter.packaging.layers import read_toml
from tests.fakes.builds import HANDLER


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """The buildpack, put together."""
    folder: Path = tmp_path_factory.mktemp("pack") / "buildpack"
    assemble(folder)
    return folder


@pytest.fixture
def detect(pack, tmp_path):
    app = tmp_path / "app"
    app.mkdir()

    def detect(files: dict[str, str], **settings: str) -> tuple[int, str]:
        for name, text in files.items():
            (app / name).parent.mkdir(exist_ok=True)
            (app / name).write_text(text)
        environ = {"PATH": os.environ["PATH"], "CNB_BUILDPACK_DIR": str(pack), **settings}
        environ["CNB_BUILD_PLAN_PATH"] = str(tmp_path / "plan.toml")
        command = [sys.executable, str(pack / "bin" / "detect")]
        done = subprocess.run(command, cwd=app, env=environ, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    return detect


PLAIN = "def handle(event, context): ...\n"


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"handler.py": HANDLER}, 0),
        ({"fn/handler.py": HANDLER}, 0),
        ({"handler.py": PLAIN, "gpufn.toml": ""}, 0),
        ({"handler.py": PLAIN}, 100),
        ({"handler.py": "def load(:\n"}, 100),
        ({"main.py": HANDLER}, 100),
        ({"handler.py": PLAIN, "gpufn.toml": "[scale\n"}, 3),
        ({"handler.py": PLAIN, "gpufn.toml": "[scale]\nmox = 1\n"}, 3),
        ({"gpufn.toml": ""}, 1),
        ({"handler.py": HANDLER, "function/handler.py": HANDLER}, 3),
    ],
)
def test_exit_codes(detect, files, code):
    found, said = detect(files)
    assert found == code
    assert (len(said.splitlines()) == 3) == (code not in {0, 100})


def test_any_handler_is_taken_where_that_is_asked_for(detect):
    assert detect({"handler.py": PLAIN}, BP_GPUFN_DETECT="on")[0] == 0


def test_the_plan_asks_for_what_it_provides(detect, tmp_path):
    detect({"handler.py": HANDLER})
    plan = read_toml(tmp_path / "plan.toml")
    assert plan == {"provides": [{"name": "gpufn"}], "requires": [{"name": "gpufn"}]}


def test_the_buildpacks_version_is_gpufns(pack):
    import adapter

    assert read_toml(pack / "buildpack.toml")["buildpack"]["version"] == adapter.__version__
