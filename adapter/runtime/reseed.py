"""New randomness after a restore: replicas of one snapshot must not share a random stream.

Covers the generators that a process has without asking for them. Those a handler made itself
(`random.Random()`, `numpy.random.default_rng()`, `torch.Generator()`) are its hook's:
``after_restore(model)``. `os.urandom`, `secrets` and `uuid` ask the kernel and need nothing.
"""

from __future__ import annotations

import os
import random
import sys


def reseed() -> None:
    """Seed Python's, NumPy's, torch's and OpenSSL's generators from the kernel, where they are loaded."""
    random.seed(os.urandom(64))
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(list(os.urandom(64)))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(int.from_bytes(os.urandom(8), "little") - 2**63)
    ssl = sys.modules.get("ssl")
    if ssl is not None:
        ssl.RAND_add(os.urandom(64), 64.0)
