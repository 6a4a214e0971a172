"""The provider over a cluster of this process: its contract, and what a real one cannot be made to do at will."""

import pytest

from tests.contract.openfaas.provider import HANDLERS, ProviderContract
from tests.fakes.pods import in_this_process


@pytest.fixture
def cluster(tmp_path):
    with in_this_process(tmp_path, HANDLERS) as cluster:
        yield cluster


class TestContract(ProviderContract):
    """Over the fake."""
