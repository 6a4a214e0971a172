"""What every image of a function must be able to: answer, be dumped, be killed, and answer the same restored."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from adapter.hosts.container import ContainerHost
from adapter.hosts.engine import Engine
from adapter.records import EventName
from tests.contract.hosts.containers import function
from tests.fakes.host import Listener, ask
from tests.images.containers import Docker


def answers_the_same_after_a_kill(docker: Docker, image: str, body: Any, state: Path) -> bytes:
    """Its answer: to its first request, loaded; and again by a replica that was restored from its snapshot."""

    async def scenario() -> bytes:
        host = await ContainerHost.open(state, Engine(docker.host.removeprefix("unix://")), network="none")
        try:
            wanted = function(image, snapshot="auto")
            await host.prepare(wanted)
            first, second = Listener(), Listener()
            replica = await host.start(wanted, first)
            answer = await ask(replica, body if isinstance(body, bytes) else json.dumps(body).encode())
            taken = (await first.heard(EventName.SNAPSHOT, times=2)).fields
            assert taken["state"] == "published", taken
            replica.kill()
            await first.heard(EventName.STOPPED)
            again = await ask(
                await host.start(wanted, second), body if isinstance(body, bytes) else json.dumps(body).encode()
            )
            record = (await second.heard(EventName.STARTED)).fields["record"]
            assert record["rung"] == "restore", record["skipped"]
            assert again == answer
            return answer
        finally:
            await host.close()

    return asyncio.run(scenario())
