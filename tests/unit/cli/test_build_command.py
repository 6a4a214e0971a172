"""`gpufn build` on a terminal: what is told while it runs, and what is looked at before."""

import pytest

from adapter.cli import build as module
from adapter.cli.build import _check_run_image, _phases
from adapter.errors import NotFound, Unavailable
from adapter.registry.reference import Reference


@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_is_not_told_while_the_build_runs_too(capsys, verbose):
    """The command ends with it."""
    with _phases(verbose=verbose) as watch:
        watch("BUILDING", "")
        watch("BUILDING", "  packages: new")
        for line in ("✗ It broke.  [it-broke]", "  Because.", "  Mend it.", "ERROR: failed to build"):
            watch("BUILDING", line)
        watch("BUILDING", "  after all")
    told = capsys.readouterr().err
    assert "packages: new" in told
    assert "after all" in told
    assert "Because." not in told
    assert "Mend it." not in told


class Registry:
    """Stands for a registry's client, and answers as it is told to."""

    def __init__(self, answer: Exception) -> None:
        self.answer = answer

    def __call__(self, *_: object) -> "Registry":
        return self

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def resolve(self, architecture: str) -> None:
        raise self.answer


def test_a_run_image_that_its_registry_does_not_have_is_named_with_the_option(monkeypatch):
    monkeypatch.setattr(module, "Client", Registry(NotFound("no", why="The registry answered 404.")))
    with pytest.raises(NotFound, match=r"registry\.example\.com/run") as caught:
        _check_run_image(Reference.parse("registry.example.com/run:1"))
    assert caught.value.hint.startswith("Check --run-image")


def test_a_registry_that_does_not_answer_here_may_answer_the_build(monkeypatch):
    monkeypatch.setattr(module, "Client", Registry(Unavailable("no")))
    _check_run_image(Reference.parse("registry.example.com/run:1"))
