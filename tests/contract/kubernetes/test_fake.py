"""The fake API server keeps the contract that tests/cluster/test_api.py holds the real one to."""

import asyncio

from tests.contract.kubernetes.scenes import ApiScenes
from tests.fakes.api_server import FakeApiServer


class TestFake(ApiScenes):
    def play(self, scene):
        async def played():
            server = FakeApiServer()
            server.compact()
            async with server.serving(), server.client() as api:
                await asyncio.wait_for(scene(api, "team"), 60)

        asyncio.run(played())
