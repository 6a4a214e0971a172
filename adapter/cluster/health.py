"""What a component answers to those who ask how it is: ``/healthz``, ``/readyz``, ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector

from adapter import __version__

Check = Callable[[], str]
"""Why not; empty where all is well."""


def new_registry() -> CollectorRegistry:
    """With what every component tells of itself: memory, processor time, its version."""
    # A series more for each one, which no board asks for.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Gauge("gpufn_build_info", "Always 1; the version is the label", ["version"], registry=registry)
    build.labels(__version__).set(1)
    return registry


class Health:
    """Alive unless a check of `alive` says why not; ready when none of `ready` does, and until it drains."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.alive: dict[str, Check] = {}
        self.ready: dict[str, Check] = {}
        self.draining = False
        self._registry = registry

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _healthz(self, _: web.Request) -> web.Response:
        return _answer(self.alive)

    async def _readyz(self, _: web.Request) -> web.Response:
        return _answer(self.ready | ({"draining": lambda: "it is told to stop"} if self.draining else {}))

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4"})


def _answer(checks: dict[str, Check]) -> web.Response:
    failed = {name: why for name, check in checks.items() if (why := check())}
    text = "".join(f"{name}: {why}\n" for name, why in failed.items()) or "ok\n"
    return web.Response(text=text, status=503 if failed else 200)
