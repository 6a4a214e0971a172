"""What the entrypoint makes of what was found out about the machine's GPUs."""

import pytest

from adapter.gpu.capabilities import Capabilities, Feature, Verdict
from adapter.runtime.gpu import keeps_addresses, why_not_park


@pytest.fixture
def kept(tmp_path):
    """A file of verdicts: this one for a feature, and good ones for the rest."""

    def kept(verdict, feature=Feature.PLAIN):
        path = tmp_path / "capabilities.json"
        path.write_text(Capabilities({}, {each: Verdict(True) for each in Feature} | {feature: verdict}).to_json())
        return str(path)

    return kept


@pytest.mark.parametrize("plain", [Verdict(True), Verdict(None, "canary-failed", "The GPU was full.")])
def test_a_park_is_tried_where_nothing_is_known_against_it(kept, plain):
    assert why_not_park(kept(plain)) is None


def test_a_driver_that_cannot_park_is_not_asked_and_says_why(kept):
    refusal = why_not_park(kept(Verdict(False, "gpu-checkpoint-unsupported", "Too old.", "Update it.")))
    assert refusal is not None
    assert (refusal.code, refusal.why, refusal.hint) == ("gpu-checkpoint-unsupported", "Too old.", "Update it.")


@pytest.mark.parametrize(("works", "keeps"), [(True, True), (None, True), (False, False)])
def test_weights_keep_their_addresses_unless_such_memory_cannot_be_parked(kept, works, keeps):
    assert keeps_addresses(kept(Verdict(works), Feature.VIRTUAL)) is keeps
    assert keeps_addresses("")


def test_no_file_and_a_damaged_one_say_nothing(tmp_path):
    assert why_not_park("") is None
    assert why_not_park(str(tmp_path / "missing")) is None
    (tmp_path / "damaged").write_text("[]")
    assert why_not_park(str(tmp_path / "damaged")) is None
