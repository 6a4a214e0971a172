"""GPU models by name: what a user calls one, against what drivers, labels and clouds call it.

Pure. The one place that compares them: ``A100``, ``a100-80gb``, ``NVIDIA-A100-SXM4-80GB``, ``NVIDIA A100-SXM4-80GB``
and ``nvidia-tesla-t4`` are names that people copy from somewhere.
"""

from __future__ import annotations

import re
from functools import lru_cache

_MAKERS = frozenset({"nvidia", "tesla", "geforce", "amd", "instinct", "radeon", "intel", "gpu"})
"""Words that some names of a model have and others leave out."""

_WORD = re.compile(r"[a-z0-9]+")
_SERIES = re.compile(r"\b([rg]tx)(?=[a-z]?[0-9])")
"""``rtx4090`` is ``rtx 4090``."""
_GIGABYTES = re.compile(r"([0-9]{2,3})g(?:i?b)?")
"""A word that says the memory: ``80gb``, ``80g``, ``80gib``."""

_LEAST, _MOST = 0.92, 1.03
"""A "16GB" card has 15 to 16 GiB, as drivers count it."""


def matches(wanted: str, model: str, memory_bytes: int = 0) -> bool:
    """Whether a user's word for a model means this name: all its parts are in there, as whole words.

    ``a100-80gb`` is "NVIDIA A100-SXM4-80GB", and ``a10`` is not. `memory_bytes` of the GPU speak for the memory
    where the name says none; 0: not known.
    """
    words = _words(wanted)
    missing = (words - _MAKERS or words) - _words(model)
    if not missing or not memory_bytes:
        return not missing
    sizes = [_GIGABYTES.fullmatch(word) for word in missing]
    said = any(_GIGABYTES.fullmatch(word) for word in _words(model))
    return not said and all(size and _is_about(memory_bytes, int(size[1])) for size in sizes)


@lru_cache(maxsize=4096)
def _words(name: str) -> frozenset[str]:
    return frozenset(_canonical(word) for word in _WORD.findall(_SERIES.sub(r"\1 ", name.lower())))


def _canonical(word: str) -> str:
    size = _GIGABYTES.fullmatch(word)
    return f"{size[1]}gb" if size else word


def _is_about(memory_bytes: int, gigabytes: int) -> bool:
    return _LEAST <= memory_bytes / 2**30 / gigabytes <= _MOST
