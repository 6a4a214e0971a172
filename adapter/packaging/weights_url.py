"""Weights at an address: one file with a digest."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from adapter.errors import ConfigError
from adapter.packaging.weights_download import Downloader
from adapter.packaging.weights_source import Entry, Progress, is_safe


class UrlSource:
    """The file at `url`, whose digest is ``sha256:…``."""

    def __init__(self, url: str, digest: str, downloader: Downloader | None = None) -> None:
        self._url = url
        self._sha256 = digest.removeprefix("sha256:")
        self._downloader = downloader
        parts = urlsplit(url)
        self._name = unquote(parts.path).rpartition("/")[2]
        self._shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"

    @property
    def pinned(self) -> str:
        return f"{self._shown}@sha256:{self._sha256}"

    def entries(self) -> list[Entry]:
        if not is_safe(self._name):
            raise ConfigError(
                f"{self._shown} names no file.",
                why="What kind of weights they are is known by the file's name.",
                hint="Name an address that ends with it: https://…/model.safetensors",
                code="weights-source",
            )
        return [Entry(self._name, -1)]

    def fetch(self, entry: Entry, folder: Path, progress: Progress) -> Path:
        downloader = self._downloader or Downloader()
        path = folder / entry.name
        try:
            downloader.fetch(self._url, path, name=entry.name, sha256=self._sha256, progress=progress)
        finally:
            downloader.close()
        return path
