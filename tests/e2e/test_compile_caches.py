"""What a model compiles while it warms up is there for later starts, and nothing that a request compiled."""

import pytest

from adapter.keys import ENV_CRIU
from benchmarks.session import REPOSITORY, Session
from benchmarks.wakes import ZERO

pytestmark = [pytest.mark.e2e, pytest.mark.criu]

FOUND = "found, of 1700000000123456789"


@pytest.fixture(scope="module")
def envs(tmp_path_factory):
    return tmp_path_factory.mktemp("envs")


def session_over(tmp_path, envs, **variables):
    return Session(tmp_path / "state", functions=REPOSITORY / "tests" / "functions", envs=envs, variables=variables)


def bundles(session):
    return list((session.state / "snapshots").glob("*/compiles.*/compile-*/compile.tar"))


def test_a_start_finds_what_an_earlier_one_compiled(tmp_path, envs):
    """With process snapshots switched off: that is where compile caches are all that is kept."""
    with session_over(tmp_path, envs) as session:
        session.deploy("compiles", {**ZERO, "gpufn.dev/snapshot": "off"})
        first = session.request("POST", "/function/compiles?compile=1").json()
        assert first == {"load": "compiled", "here": ["kernel.so", "later.cubin"]}
        session.wait_for_snapshot("compiles")
        assert len(bundles(session)) == 1
        session.to_zero("compiles")
        assert session.call("compiles").json() == {"load": FOUND, "here": ["kernel.so"]}
        session.to_zero("compiles")
        assert session.snapshot("compiles")["state"] == "published"  # and not taken again


def test_a_machine_without_criu_keeps_compile_caches_all_the_same(tmp_path, envs):
    with session_over(tmp_path, envs, **{ENV_CRIU: "/nowhere/criu"}) as session:
        session.deploy("compiles", ZERO)
        assert session.call("compiles").json()["load"] == "compiled"
        session.wait(lambda: session.snapshot("compiles").get("state") == "skipped", "no process snapshot", 60)
        session.to_zero("compiles")
        assert session.call("compiles").json()["load"] == FOUND


def test_a_restored_process_compiles_into_a_folder_of_its_own(tmp_path, envs):
    with session_over(tmp_path, envs) as session:
        session.deploy("compiles", ZERO)
        session.call("compiles")
        session.wait_for_snapshot("compiles")
        for _ in range(2):
            session.to_zero("compiles")
            assert session.request("POST", "/function/compiles?compile=1").json() == {
                "load": "compiled",
                "here": ["later.cubin"],
            }
            assert [replica["rung"] for replica in session.replicas("compiles")] == ["restore"]
        assert len(bundles(session)) == 1


def test_a_damaged_bundle_is_compiled_anew(tmp_path, envs):
    with session_over(tmp_path, envs) as session:
        session.deploy("compiles", {**ZERO, "gpufn.dev/snapshot": "off"})
        session.call("compiles")
        session.wait_for_snapshot("compiles")
        session.to_zero("compiles")
        (bundle,) = bundles(session)
        data = bytearray(bundle.read_bytes())
        data[600] ^= 1
        bundle.chmod(0o600)
        bundle.write_bytes(data)
        assert session.call("compiles").json()["load"] == "compiled"
