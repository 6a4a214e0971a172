"""Checkpoints made without torch."""

from __future__ import annotations

import json
import struct


def safetensors(**values: list[float]) -> bytes:
    """A safetensors file: vectors of float32 by name."""
    header, data = {}, b""
    for name, numbers in values.items():
        part = struct.pack(f"<{len(numbers)}f", *numbers)
        header[name] = {"dtype": "F32", "shape": [len(numbers)], "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
