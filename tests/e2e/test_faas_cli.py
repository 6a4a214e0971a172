"""The real faas-cli against our gateway, where there is one (on the PATH, or named by FAAS_CLI)."""

import pytest

from tests.contract.openfaas.scenario import CREDENTIALS, STEPS, faas_cli, fake_host, run_step, settled
from tests.fakes.replicas import run, serving

pytestmark = [pytest.mark.e2e, pytest.mark.faas_cli]


def test_every_command(state_dir, tmp_path):
    async def scenario():
        binary = faas_cli()
        assert binary is not None
        home = tmp_path / "home"
        home.mkdir()
        async with serving(state_dir, fake_host(state_dir), CREDENTIALS) as up:
            for step in STEPS:
                code, output = await run_step(binary, step, up.url, home)
                assert code == step.code, f"{step.name}: {output}"
                for words in step.says:
                    assert words in output, step.name
                await settled(up)

    run(scenario())
