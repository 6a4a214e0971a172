"""Examples of a function: requests with the answers they should have.

They warm a model up before it is snapshotted or takes its first request, and check it after a restore.
One JSON file each in ``examples/``, run in the order of their names:

    {"request":  {"method": "POST", "path": "/", "headers": {}, "body": "text, or a JSON value" },
     "response": {"status": 200, "json": {"label": "cat", "score": 0.93}, "tolerance": 0.0001}}

A request has ``body`` (text as it is; any other JSON value as application/json) or ``body_base64``.
A response may say ``body`` (the whole text), ``body_contains`` or ``json`` (numbers compared within
``tolerance``, absolute or relative); without them only the status counts.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import ConfigError
from adapter.keys import EXAMPLES_FOLDER

_REQUEST_KEYS = frozenset({"method", "path", "headers", "body", "body_base64"})
_RESPONSE_KEYS = frozenset({"status", "body", "body_contains", "json", "tolerance"})
DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Example:
    """One request and what its answer must be like."""

    name: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    expected: dict[str, Any]

    def check(self, status: int, headers: Mapping[str, str], body: bytes) -> str:
        """What differs between an answer and the expected one; empty when nothing does."""
        wanted = self.expected.get("status", 200)
        if status != wanted:
            return f"status {status} instead of {wanted}"
        text = body.decode("utf-8", errors="replace")
        if "body" in self.expected and text != self.expected["body"]:
            return f"body {_short(text)} instead of {_short(self.expected['body'])}"
        if "body_contains" in self.expected and self.expected["body_contains"] not in text:
            return f"body {_short(text)} does not contain {_short(self.expected['body_contains'])}"
        if "json" in self.expected:
            try:
                value = json.loads(body)
            except (ValueError, RecursionError):
                return f"body {_short(text)} is not JSON"
            return difference(value, self.expected["json"], self.expected.get("tolerance", DEFAULT_TOLERANCE))
        return ""


def difference(value: Any, wanted: Any, tolerance: float, at: str = "$") -> str:
    """Where two JSON values differ (``$.scores[2]: 0.5 instead of 0.7``); empty when they do not."""
    if _is_number(value) and _is_number(wanted):
        same = value == wanted or _is_close(value, wanted, tolerance)
        return "" if same else f"{at}: {_clip(str(value))} instead of {_clip(str(wanted))}"
    if isinstance(value, dict) and isinstance(wanted, dict):
        if value.keys() != wanted.keys():
            return f"{at}: keys {sorted(value)} instead of {sorted(wanted)}"
        return next(filter(None, (difference(value[k], wanted[k], tolerance, f"{at}.{k}") for k in wanted)), "")
    if isinstance(value, list) and isinstance(wanted, list):
        if len(value) != len(wanted):
            return f"{at}: {len(value)} items instead of {len(wanted)}"
        pairs = enumerate(zip(value, wanted, strict=True))
        return next(filter(None, (difference(v, w, tolerance, f"{at}[{i}]") for i, (v, w) in pairs)), "")
    same = type(value) is type(wanted) and value == wanted
    return "" if same else f"{at}: {_short(str(value))} instead of {_short(str(wanted))}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_close(value: float, wanted: float, tolerance: float) -> bool:
    try:
        return math.isclose(value, wanted, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # a whole number beyond what floats reach
        return False


def _short(text: str) -> str:
    return repr(_clip(text))


def _clip(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def load_examples(folder: Path) -> list[Example]:
    """The examples of a function folder, by name. Raises `ConfigError` naming the file and what is wrong."""
    return [_load(path) for path in sorted((folder / EXAMPLES_FOLDER).glob("*.json"))]


def _load(path: Path) -> Example:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as exc:
        raise _bad(path, f"It cannot be read: {exc}.") from exc
    if not isinstance(data, dict) or not isinstance(data.get("request"), dict):
        raise _bad(path, "It has no request.")
    request, response = data["request"], data.get("response", {})
    if not isinstance(response, dict):
        raise _bad(path, "Its response is no object.")
    unknown = sorted(
        (request.keys() - _REQUEST_KEYS) | (response.keys() - _RESPONSE_KEYS) | (data.keys() - {"request", "response"})
    )
    if unknown:
        raise _bad(path, f"Unknown keys: {', '.join(unknown)}.")
    return _checked(path, request, response)


def _checked(path: Path, request: dict[str, Any], response: dict[str, Any]) -> Example:
    headers = request.get("headers", {})
    if not isinstance(headers, dict):
        raise _bad(path, "request.headers is no object.")
    headers = {str(name): str(value) for name, value in headers.items()}
    method, target = request.get("method", "POST"), request.get("path", "/")
    if not isinstance(method, str) or not isinstance(target, str) or not target.startswith("/"):
        raise _bad(path, "request.method is text, and request.path is text that begins with a slash.")
    if "body" in request and "body_base64" in request:
        raise _bad(path, "The request has two bodies.")
    if type(response.get("status", 200)) is not int:
        raise _bad(path, "response.status is no whole number.")
    if not isinstance(response.get("body_contains", ""), str) or not isinstance(response.get("body", ""), str):
        raise _bad(path, "response.body and body_contains are text; use json for values.")
    if not _is_number(response.get("tolerance", 0)) or response.get("tolerance", 0) < 0:
        raise _bad(path, "response.tolerance is no number of zero or more.")
    body = request.get("body", "")
    if "body_base64" in request:
        try:
            data = base64.b64decode(request["body_base64"], validate=True)
        except (ValueError, TypeError) as exc:
            raise _bad(path, "request.body_base64 is no base64.") from exc
    elif isinstance(body, str):
        data = body.encode()
    else:
        data = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    return Example(path.stem, method.upper(), target, headers, data, response)


def _bad(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"The example {path} cannot be used.",
        why=why,
        hint='Write {"request": {"body": …}, "response": {"status": 200, "json": …}}.',
        code="bad-example",
    )
