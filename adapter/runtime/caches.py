"""A replica's compile caches: brought from the store before its model starts, worth keeping after it warmed up."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from adapter.errors import NotFound, SnapshotError
from adapter.runtime.ladder import COMPILED, Wanted
from adapter.snapshot import compile_caches


class Caches:
    """The private folder that compilers of one replica use."""

    def __init__(self, runtime_dir: Path) -> None:
        self.folder = runtime_dir / "compile"

    @property
    def variables(self) -> dict[str, str]:
        return compile_caches.variables(self.folder)

    def bring(self, wanted: Wanted) -> None:
        """What an earlier warm-up compiled, if it is kept; else this one compiles anew."""
        if not wanted.keeps_compile_caches or compile_caches.is_used(self.folder):
            return
        try:
            found = wanted.find(COMPILED)
            compile_caches.unpack(found.path / compile_caches.BUNDLE, self.folder)
        except NotFound:
            return
        except Exception as error:  # boundary: what is kept makes a start faster, and never fails one
            shutil.rmtree(self.folder, ignore_errors=True)  # half of a cache would count as one
            print(f"gpufn: compile caches are not used: {error}", file=sys.stderr, flush=True)

    def are_new(self, wanted: Wanted) -> bool:
        """Whether something was compiled here, and nothing is kept yet."""
        if not wanted.keeps_compile_caches or not compile_caches.is_used(self.folder):
            return False
        try:
            wanted.find(COMPILED)
        except (NotFound, SnapshotError):
            return True
        except Exception:  # boundary: a store that cannot be read takes nothing either
            return False
        return False
