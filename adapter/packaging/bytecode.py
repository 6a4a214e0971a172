"""Byte-code that is the same for the same sources, and that no start checks against its source again.

Run by the interpreter that will read the byte-code: ``python -m adapter.packaging.bytecode FOLDER [--checked]``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import py_compile
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

_SHARES = 16
"""Files are compiled in so many shares, each by a process of its own, whatever the number of cores: what a process has
compiled before shows in what it compiles next (which strings are shared)."""


def compile_folder(folder: Path, *, checked: bool = False) -> int:
    """Compile every module below `folder`; how many. One that does not compile is left as it is: it may never be
    imported. `checked`: starts compare the sources' hashes, for folders that people edit in place.

    The caller's interpreter must hash strings as PYTHONHASHSEED=0 has it, or sets of constants vary.
    """
    paths = sorted(str(path) for path in folder.rglob("*.py") if path.is_file() and not path.is_symlink())
    mode = py_compile.PycInvalidationMode.CHECKED_HASH if checked else py_compile.PycInvalidationMode.UNCHECKED_HASH
    shares = [share for share in (paths[start::_SHARES] for start in range(_SHARES)) if share]
    if len(paths) < _SHARES * 4:
        return sum(map(partial(_compile, mode), shares))
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        return sum(pool.imap_unordered(partial(_compile, mode), shares, chunksize=1))


def _compile(mode: py_compile.PycInvalidationMode, paths: Sequence[str]) -> int:
    done = 0
    for path in paths:
        try:
            py_compile.compile(path, doraise=True, quiet=2, invalidation_mode=mode)
            done += 1
        except (py_compile.PyCompileError, ValueError, RecursionError, MemoryError):
            continue  # templates, tests of other versions, broken on purpose
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m adapter.packaging.bytecode")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checked", action="store_true")
    wanted = parser.parse_args(arguments)
    print(compile_folder(wanted.folder, checked=wanted.checked), flush=True)  # noqa: T201  # a command's answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
