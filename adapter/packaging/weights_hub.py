"""Weights in a repository of a Hugging Face hub, at a commit or tag; `HF_ENDPOINT` names another hub.

The hub says each file's digest (SHA-256 of large ones, git's of small ones): what comes is compared. The token is
the one that is given, never one of the builder's environment or home.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from adapter.errors import AdapterError, ConfigError, NotFound, Unavailable
from adapter.packaging.weights_folder import digest_of
from adapter.packaging.weights_source import Entry, Progress, disk_error, other_digest

_TIMEOUT_S = 30.0
_ATTEMPTS = 4
_PAUSE_S = 0.5
_COPY_BYTES = 2**20
_T = TypeVar("_T")


class HubSource:
    """The model repository `name` at `revision`."""

    def __init__(self, name: str, revision: str, token: str = "", endpoint: str = "") -> None:
        self._name = name
        self._revision = revision
        self._token: str | bool = token or False  # False: not the builder's own either
        self._endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
        self._commit = ""
        self._files: dict[str, Any] = {}

    @property
    def pinned(self) -> str:
        return f"hf://{self._name}@{self._commit or self._revision}"

    def entries(self) -> list[Entry]:
        hub = _library()
        api = hub.HfApi(endpoint=self._endpoint, token=self._token)
        info = self._asked(
            lambda: api.model_info(self._name, revision=self._revision, files_metadata=True, timeout=_TIMEOUT_S)
        )
        self._commit = str(info.sha)
        self._files = {item.rfilename: item for item in info.siblings or ()}
        return [Entry(name, -1 if item.size is None else item.size) for name, item in self._files.items()]

    def fetch(self, entry: Entry, folder: Path, progress: Progress) -> Path:
        path = self._download(entry, folder)
        self._check(entry, path)
        progress(entry.name, path.stat().st_size, path.stat().st_size)
        return path

    def _download(self, entry: Entry, folder: Path) -> Path:
        """What was cut goes on where it was cut: the library keeps what has come."""
        hub = _library()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                found = self._asked(
                    lambda: hub.hf_hub_download(
                        self._name,
                        entry.name,
                        revision=self._commit,
                        local_dir=folder,
                        token=self._token,
                        endpoint=self._endpoint,
                    )
                )
                return Path(found)
            except Unavailable as error:
                if error.code != "weights-unreachable" or attempt == _ATTEMPTS:
                    raise
            time.sleep(_PAUSE_S * attempt)
        raise AssertionError("unreachable")

    def _check(self, entry: Entry, path: Path) -> None:
        item = self._files[entry.name]
        what = f"{entry.name} of {self.pinned}"
        if item.lfs is not None:
            wanted, found = str(item.lfs["sha256"]), digest_of(path)
        elif item.blob_id is not None:
            wanted, found = str(item.blob_id), _git_digest_of(path)
        else:
            return  # the library has compared its size
        if found != wanted:
            path.unlink()
            raise other_digest(what, found, wanted)

    def _asked(self, ask: Callable[[], _T]) -> _T:
        """What the hub answers, its errors in our words; nothing of them can hold the token."""
        from huggingface_hub import errors

        try:
            return ask()
        except (errors.GatedRepoError, errors.DisabledRepoError) as exc:
            raise self._denied("The hub gives it to those only whom its owner let in") from exc
        except errors.RevisionNotFoundError as exc:
            raise self._missing(f"It has no revision {self._revision}") from exc
        except errors.EntryNotFoundError as exc:
            raise self._missing("A file that it lists is not there") from exc
        except errors.RepositoryNotFoundError as exc:  # also: private, and the token is missing or another's
            raise self._missing("The hub has no such repository, or not for this token") from exc
        except errors.HfHubHTTPError as exc:
            status = getattr(exc.response, "status_code", None)
            if status in {401, 403}:
                raise self._denied(f"The hub says {status}") from exc
            raise self._unreachable(f"The hub says {status or 'something that is no answer'}") from exc
        except OSError as exc:
            if exc.errno is not None:
                raise disk_error(exc, self.pinned) from exc
            raise self._unreachable(type(exc).__name__) from exc
        except AdapterError:
            raise
        except Exception as exc:  # boundary: its HTTP library's errors are not in its promise
            raise self._unreachable(type(exc).__name__) from exc

    def _missing(self, why: str) -> NotFound:
        return NotFound(
            f"The weights {self.pinned} are missing.",
            why=f"{why}.",
            hint="See the names and the revision; for a private one, give the build its token.",
            code="weights-missing",
        )

    def _denied(self, why: str) -> Unavailable:
        return Unavailable(
            f"The weights {self.pinned} are refused.",
            why=f"{why}.",
            hint="Ask for access on the repository's page, and give the build a token that has it.",
            code="weights-denied",
        )

    def _unreachable(self, why: str) -> Unavailable:
        return Unavailable(
            f"The weights {self.pinned} cannot be fetched.",
            why=f"{why}.",
            hint="Try again; see HF_ENDPOINT, HTTPS_PROXY and SSL_CERT_FILE of the builder.",
            code="weights-unreachable",
        )


def _library() -> Any:
    """The hub's own client, told to be silent."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        os.environ.setdefault(name, "1")  # read when it is imported
    try:
        import huggingface_hub
    except ImportError as exc:
        raise ConfigError(
            "Weights cannot be fetched from a hub.",
            why=f"{exc.name} is not installed here.",
            hint="Install gpufn[build] where images are built.",
            code="build-extra",
        ) from exc
    return huggingface_hub


def _git_digest_of(path: Path) -> str:
    """As git names a file of this content."""
    whole = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_COPY_BYTES):
            whole.update(chunk)
    return whole.hexdigest()
