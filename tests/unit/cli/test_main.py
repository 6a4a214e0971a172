import json
import os
import pty
import subprocess
import sys
import types

import click
import pytest

from adapter import __version__, errors
from adapter.cli import main
from adapter.cli.errors import format_error
from adapter.cli.main import COMMANDS, run
from adapter.errors import AdapterError, ConfigError


@pytest.fixture
def command(monkeypatch):
    """Makes `gpufn test` run a function."""

    def install(body):
        module = types.ModuleType("commands_test")
        module.command = click.Command("test", callback=body)
        monkeypatch.setitem(sys.modules, "commands_test", module)
        monkeypatch.setitem(COMMANDS, "test", main.Entry("commands_test", "Make", "Tests."))

    return install


def test_help_names_every_command_in_its_panel(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert f"  {name} " in out
        assert entry.summary.split()[0] in out
    assert out.index("Make:") < out.index("Look:") < out.index("Usage:\n")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, json; before = set(sys.modules); from adapter.cli.main import run; run(['--help'])\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"sqlalchemy", "rich", "requests", "yaml", "aiohttp", "flask", "torch", "asyncio", "sqlite3"}
    assert not heavy & set(json.loads(done.stderr))


def test_every_command_that_is_here_explains_itself(capsys):
    for name in COMMANDS:
        assert run([name, "--help"]) in (0, 1)
        captured = capsys.readouterr()
        assert captured.out.startswith("Usage: gpufn") or "[not-installed]" in captured.err


def test_help_is_a_command_too(capsys):
    for words, same in ((["help"], ["--help"]), (["help", "snapshot", "list"], ["snapshot", "list", "--help"])):
        assert run(words) == 0
        shown = capsys.readouterr().out
        assert run(same) == 0
        assert shown == capsys.readouterr().out
    assert run(["help", "usge"]) == 2
    assert "Did you mean 'usage'?" in capsys.readouterr().err


def test_without_a_word_it_explains_itself(capsys):
    assert run([]) == 0
    assert capsys.readouterr().out.startswith("Usage: gpufn")


def test_the_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"gpufn {__version__}\n"


def test_a_mistyped_command_gets_the_nearest(capsys):
    assert run(["usge"]) == 2
    assert "Did you mean 'usage'?" in capsys.readouterr().err
    assert run(["qqqq"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_an_unknown_option_is_wrong_usage(capsys):
    assert run(["usage", "report", "--colour"]) == 2
    assert "--colour" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [AdapterError, *AdapterError.__subclasses__()])
def test_errors_are_three_lines_and_their_exit_code(command, capsys, kind):
    def fail():
        raise kind("It broke.", why="It was old.", hint="Buy a new one.", code="old")

    command(fail)
    assert run(["test"]) == kind.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "✗ It broke.  [old]\n  It was old.\n  Buy a new one.\n"


def test_an_error_without_reason_is_one_line():
    assert format_error(ConfigError("It broke.")) == "✗ It broke.  [bad-configuration]"


def test_what_nobody_foresaw_says_how_to_see_more(command, capsys):
    def fail():
        raise ZeroDivisionError("by zero")

    command(fail)
    assert run(["test"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: by zero  [bug]" in err
    assert "gpufn --debug test" in err
    assert "Traceback" not in err
    assert run(["--debug", "test"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(command, capsys):
    def fail():
        raise errors.NotFound("Nothing there.")

    command(fail)
    assert run(["--debug", "test"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(command, capsys):
    def fail():
        raise KeyboardInterrupt

    command(fail)
    assert run(["test"]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


def test_the_exit_code_a_command_returns(command):
    command(lambda: 3)
    assert run(["test"]) == 3
    command(lambda: None)
    assert run(["test"]) == 0


def test_a_missing_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "test", main.Entry("json.no_such_thing", "Make", "Tests."))
    assert run(["test"]) == 1
    err = capsys.readouterr().err
    assert "[not-installed]" in err
    assert "pip install 'gpufn[all]'" in err
    assert run(["--help"]) == 0


def test_a_reader_that_has_enough_is_no_error():
    code = """
import sys, types
import click
from adapter.cli import main
sys.modules["m"] = module = types.ModuleType("m")
module.command = click.Command("t", callback=lambda: [click.echo("x" * 1000) for _ in range(10000)])
main.COMMANDS["t"] = main.Entry("m", "Make", "")
sys.argv = ["gpufn", "t"]
main.main()
"""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.communicate()[1] == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colour_is_for_terminals_that_want_it(variables, coloured):
    """In a command and in the error that ends it, on a real terminal."""
    code = (
        "import sys, types, click\n"
        "from adapter.cli import main\n"
        "from adapter.cli.output import warn\n"
        "from adapter.errors import ConfigError\n"
        "def body():\n"
        "    warn('a warning')\n"
        "    raise ConfigError('an error')\n"
        "sys.modules['commands_test'] = types.SimpleNamespace(command=click.Command('test', callback=body))\n"
        "main.COMMANDS['test'] = main.Entry('commands_test', 'Make', 'Tests.')\n"
        "sys.exit(main.run(['test']))\n"
    )
    environment = (
        {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"} | variables
    )
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=False)
    os.close(theirs)
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 3
    assert "a warning" in said
    assert "an error" in said
    assert said.count("\x1b[3") == (2 if coloured else 0)
