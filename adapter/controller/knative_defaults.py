"""Knative's own settings, as its administrator has them: what differs from them goes into templates and Revisions."""

from __future__ import annotations

from collections.abc import Mapping

from adapter.cluster.api import Api
from adapter.cluster.informer import Informer
from adapter.cluster.resources import CONFIG_MAPS
from adapter.knative.autoscaling import Defaults

_KNATIVE_NAMESPACE = "knative-serving"


class KnativeDefaults:
    """What Knative's ConfigMaps say, where there is a Knative that may be asked; else what it comes with.

    Its `caches` are to be run."""

    def __init__(self, api: Api) -> None:
        path = CONFIG_MAPS.path(_KNATIVE_NAMESPACE)
        self.caches: tuple[Informer[Mapping[str, str]], ...] = tuple(
            Informer(
                api,
                path,
                lambda value: dict(value.get("data") or {}),
                field_selector=f"metadata.name={name}",
                optional=True,
            )
            for name in ("config-autoscaler", "config-defaults")
        )
        self._read: Defaults | None = None
        for each in self.caches:
            each.on_change(self._changed)

    def read(self) -> Defaults:
        if self._read is None:
            autoscaler, defaults = (next(iter(each.snapshot().values()), {}) for each in self.caches)
            self._read = Defaults.read(autoscaler, defaults)
        return self._read

    def _changed(self, *_: object) -> None:
        self._read = None
