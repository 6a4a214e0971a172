"""What of-watchdog answered, our entrypoint answers too, but for the differences that are meant. See `record.py`."""

import functools
import json
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.contract.watchdog.record import conversation, free_ports
from tests.contract.watchdog.scenario import HANDLER, SCENES, Program, open_gate, own_environment, play

pytestmark = pytest.mark.e2e

_TRUTH = "readiness says whether the model can answer; of-watchdog does not know"
_WORDS = "an error says what happened, why and what to do, and who says it"
_STATE = "a probe's body names the state"
_METHODS = "every method is the handler's: OPTIONS and HEAD too"
_LATER = "a request is answered 503 with Retry-After where the function cannot be started: another replica may do it"

MEANT = {
    # (scene, act, part), each a pattern as a shell's -> why. docs/reference/watchdog-contract.md has them for users.
    ("*", "*", "header x-call-id"): "each answer has its call's id, not only those that a gateway gave one",
    ("*", "health*", "body"): _STATE,
    ("*", "health*", "header content-*"): _STATE,
    ("*", "ready*", "body"): _STATE,
    ("*", "ready*", "header content-*"): _STATE,
    ("requests", "* by POST", "status"): "probes are answered before anybody reads their method",
    ("ready_path*", "ready", "header x-duration-seconds"): "a probe is not timed",
    ("requests", "options", "*"): _METHODS,
    ("requests", "unknown method", "*"): _METHODS,
    ("streams", "events unasked", "header content-length"): "a stream is sent as it comes, whatever was accepted",
    ("*", "metrics", "buckets"): "three buckets more, above ten seconds: model answers begin there",
    ("at its limit", "one too many", "body"): _WORDS,
    ("at its limit", "one too many", "header *"): _WORDS,
    ("exec_timeout", "too long", "body"): _WORDS,
    ("exec_timeout", "too long", "header x-openfaas-internal"): _WORDS,
    ("exec_timeout", "too long", "header content-*"): _WORDS,
    ("X-Timeout", "lowered", "body"): _WORDS,
    ("X-Timeout", "lowered", "header x-openfaas-internal"): _WORDS,
    ("X-Timeout", "lowered", "header content-*"): _WORDS,
    ("no function", "ready", "status"): _TRUTH,
    ("no function", "root", "*"): _LATER,
}


def started(scene, folder: Path) -> Program:
    port, metrics_port = free_ports(2)
    gate, path = open_gate(folder)
    function = folder / "function"
    function.mkdir()
    handler = HANDLER.read_text() if scene.starts else "raise SystemExit('not today')\n"
    (function / "handler.py").write_text(handler + ("" if scene.starts else "def handle(event, context): ...\n"))
    environment = {
        "GPUFN_FOLDER": str(function),
        "PORT": str(port),
        "GPUFN_METRICS_PORT": str(metrics_port),
        "TMPDIR": str(folder),
        "GATE": path,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "adapter.runtime"],
        env=own_environment(environment, scene),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    waited_for = "serving" if scene.starts else "failed"
    while (line := process.stdout.readline()) and json.loads(line)["event"] != waited_for:
        pass
    return Program(process, port, metrics_port, folder, gate)


@functools.cache
def differences(scene) -> dict[tuple[str, str, str], tuple[object, object]]:
    """(scene, act, part) of every difference, with what the watchdog says and what we say."""
    recorded = json.loads(conversation(scene).read_text())
    assert recorded["environment"] == dict(scene.environment)
    with tempfile.TemporaryDirectory() as name:
        program = started(scene, Path(name))
        try:
            heard = dict(play(scene, program))
        finally:
            program.close()
    assert heard.keys() == recorded["heard"].keys()
    found = {}
    for act, ours in heard.items():
        theirs = recorded["heard"][act]
        for part in parts(theirs) | parts(ours):
            pair = value(theirs, part), value(ours, part)
            if pair[0] != pair[1]:
                found[scene.name, act, part] = pair
    return found


def parts(heard) -> set[str]:
    names = {name for name in heard if name not in {"headers", "samples"}}
    return names | {f"header {name}" for name in heard.get("headers", ())} | set(heard.get("samples", ()))


def value(heard, part):
    if part.startswith("header "):
        return heard["headers"].get(part.removeprefix("header "))
    return heard.get(part, heard.get("samples", {}).get(part))


def matching(place) -> list[tuple[str, str, str]]:
    return [meant for meant in MEANT if all(map(fnmatchcase, place, meant))]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_it_answers_as_the_watchdog_does(scene):
    unmeant = {place: pair for place, pair in differences(scene).items() if not matching(place)}
    assert unmeant == {}


def test_every_difference_that_is_meant_is_there():
    seen = {meant for scene in SCENES for place in differences(scene) for meant in matching(place)}
    assert seen == set(MEANT)


def test_every_scene_is_recorded():
    assert {path.name for path in conversation(SCENES[0]).parent.glob("*.json")} == {
        conversation(scene).name for scene in SCENES
    }
