import click
import pytest

from adapter.cli.scope import Scope, namespaces_options, scope_options, split_name
from adapter.errors import NotFound


def test_the_namespace_inside_of_a_name_wins():
    assert split_name("embed", "team1") == ("embed", "team1")
    assert split_name("embed.team2", "team1") == ("embed", "team2")


@pytest.mark.parametrize(
    ("words", "scope"),
    [
        ([], Scope(None, "openfaas-fn")),
        (["embed"], Scope("embed", "openfaas-fn")),
        (["embed", "-n", "team1"], Scope("embed", "team1")),
        (["embed.team2", "-n", "team1"], Scope("embed", "team2")),
        (["embed.team2", "-A"], Scope("embed", "team2")),
        (["embed", "-A"], Scope("embed", None)),
        (["-A"], Scope(None, None)),
    ],
)
def test_options(words, scope):
    got = []

    @click.command()
    @scope_options
    def command(scope):
        got.append(scope)

    command.main(words, standalone_mode=False)
    assert got == [scope]


def test_lists_of_all_functions_take_no_name():
    @click.command()
    @namespaces_options
    def command(scope):
        pytest.fail("it ran")

    with pytest.raises(click.UsageError):
        command.main(["embed"], standalone_mode=False)


def test_only_a_name_that_nothing_is_deployed_under_is_refused(tmp_path):
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions" / "embed.team1.json").touch()
    for known in (Scope(None, None), Scope(None, "nobody"), Scope("embed", "team1"), Scope("embed", None)):
        known.require_known(tmp_path)
    for unknown in (Scope("embed", "openfaas-fn"), Scope("embe", None)):
        with pytest.raises(NotFound, match=str(unknown)):
            unknown.require_known(tmp_path)
