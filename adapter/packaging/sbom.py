"""A layer's bill of materials, as CycloneDX: which packages, which versions, under which licence. No times, no serial
numbers: the same layer has the same file."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import adapter
from adapter.packaging.packages import site_packages
from adapter.packaging.requirements import normalised

MEDIA_TYPE = "application/vnd.cyclonedx+json"


def sbom(components: Iterable[dict[str, Any]]) -> str:
    """The document."""
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"tools": {"components": [component("application", "gpufn", adapter.__version__)]}},
        "components": sorted(components, key=lambda item: (item["name"], item["version"])),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def component(kind: str, name: str, version: str, *, purl: str = "", licence: str = "") -> dict[str, Any]:
    """One entry; `licence` is an SPDX expression, or a name where a package says no more."""
    entry: dict[str, Any] = {"type": kind, "name": name, "version": version}
    if licence:
        entry["licenses"] = [{"license": {"name": licence}}]
    if purl:
        entry |= {"bom-ref": purl, "purl": purl}
    return entry


def python_packages(home: Path) -> list[dict[str, Any]]:
    """Entries for what is installed in an environment."""
    found = {}
    for item in importlib.metadata.distributions(path=[str(path) for path in site_packages(home)]):
        name = normalised(item.metadata["Name"])
        purl = f"pkg:pypi/{name}@{item.version}"
        found[purl] = component("library", name, item.version, purl=purl, licence=_licence(item))
    return list(found.values())


def _licence(item: importlib.metadata.Distribution) -> str:
    expression = (item.metadata.get_all("License-Expression") or [""])[0]
    if expression:
        return str(expression)
    named = [line.split(" :: ")[-1] for line in item.metadata.get_all("Classifier") or [] if "License ::" in line]
    return named[0] if named else str((item.metadata.get_all("License") or [""])[0]).strip().partition("\n")[0][:100]
