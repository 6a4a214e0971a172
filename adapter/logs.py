"""Logging: one JSON line an event in images and services, aligned text on a terminal.

Standard library only; configured once, by an entry point. Messages are fixed phrases, values go
into ``extra={"fields": {...}}``. Headers, bodies, environment values and secrets are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO


class JsonFormatter(logging.Formatter):
    """``{"ts", "level", "logger", "event", …fields, "traceback"?}`` on one line, UTC."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """``12:30:01 info  snapshot published  key=ab12 seconds=0.8``."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items())
        line = f"{time.strftime('%H:%M:%S')} {record.levelname.lower():<7} {record.getMessage()}  {fields}".rstrip()
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def setup(*, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send the root logger to `stream` (default: standard error) in the form that fits it."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if stream.isatty() else JsonFormatter())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level.upper())
