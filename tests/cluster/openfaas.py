"""Images of small functions, for tests of OpenFaaS on a real cluster."""

from __future__ import annotations

from pathlib import Path

from tests.contract.hosts.kubernetes import HANDLERS as HOST_HANDLERS
from tests.contract.openfaas.provider import HANDLERS
from tests.testbed import functions
from tests.testbed.cluster import Cluster


def function_images(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Names of images that every node has, by what they do."""
    layout = functions.base_layout(folder / "base")
    images = []
    for name, handler in {**HANDLERS, **HOST_HANDLERS}.items():
        source = folder / name
        source.mkdir()
        (source / "handler.py").write_text(handler)
        images.append(functions.function_image(f"dev.local/openfaas-{name}:1", source, layout, folder))
    cluster.load(*images)
    return {image.name.removeprefix("dev.local/openfaas-").removesuffix(":1"): image.name for image in images}
