"""The user's handler: find it, import it, call it, and turn what it returns into an answer.

`handle(event, context)` is OpenFaaS's ``python3-http`` shape and `handle(request)` Flask's; handlers
written for either run unchanged. No user file imports gpufn.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.errors import HandlerError
from adapter.keys import HANDLER_FILE
from adapter.spec import HandlerShape, read_handler_shape

if TYPE_CHECKING:
    from flask import Flask, Request
    from werkzeug.datastructures import MultiDict

_PACKAGE = "function"
"""Handlers are imported as ``function.handler``, as OpenFaaS's templates do."""


class Event:
    """One request, with the attributes that OpenFaaS's ``python3-http`` template gives."""

    __slots__ = ("_request", "body", "headers", "method", "path")

    def __init__(self, request: Request) -> None:
        self._request = request
        self.body: bytes = request.get_data()
        self.headers = request.headers
        self.method: str = request.method
        self.path: str = request.path

    @property
    def query(self) -> MultiDict[str, str]:
        """The query's values, parsed when they are asked for."""
        return self._request.args


class Context:
    """What a handler knows beside the request: the model that `load` returned, and where it runs."""

    __slots__ = ("hostname", "model", "secrets_dir")

    def __init__(self, model: Any = None, *, hostname: str = "localhost", secrets_dir: str = "") -> None:
        self.model = model
        self.hostname = hostname
        self.secrets_dir = secrets_dir

    def secret(self, name: str) -> str:
        """The value of a secret that the function was deployed with. Raises `FileNotFoundError`."""
        return (Path(self.secrets_dir) / os.path.basename(name)).read_text(encoding="utf-8").strip()


@dataclass
class Handler:
    """An imported handler and its context; `context.model` is set by whoever loads it."""

    module: types.ModuleType
    shape: HandlerShape
    context: Context

    def call_hook(self, name: str) -> None:
        """Run an optional hook with the model. Raises `HandlerError`."""
        hook = getattr(self.module, name, None)
        if hook is not None:
            with user_code(f"`{name}`"):
                hook(self.context.model)

    def make(self, name: str, device: str) -> Any:
        """What `load` or `build` returns. Raises `HandlerError`."""
        with user_code(f"`{name}`"):
            return getattr(self.module, name)(device)


class user_code:  # noqa: N801  # reads as a statement: with user_code("`load`"): ...
    """Turns what user code raises (SystemExit too) into a `HandlerError` that shows the user's frames only."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (HandlerError, KeyboardInterrupt)):
            return
        frames = [
            frame for frame in traceback.extract_tb(trace) if f"{os.sep}adapter{os.sep}runtime" not in frame.filename
        ]
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        message = traceback.format_exception_only(type(error), error)[-1].strip()
        print("".join(traceback.format_list(frames)) + message, file=sys.stderr, flush=True)
        raise HandlerError(
            f"The function's {self._what} failed.",
            why=f"It raised {message}{where}.",
            hint="See its log: gpufn logs NAME",
            code="handler-raised",
        ) from error


def import_handler(folder: Path) -> Handler:
    """Import ``handler.py`` of `folder` as the package ``function``. Raises `HandlerError`."""
    shape = read_handler_shape(folder)
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[_PACKAGE] = package
    sys.path.insert(0, str(folder))
    with user_code("import"):
        module = importlib.import_module(f"{_PACKAGE}.{Path(HANDLER_FILE).stem}")
    return Handler(module, shape, Context())


def make_app(handler: Handler, body_limit_bytes: int) -> Flask:
    """The Flask app that serves `handler` on every path and method.

    It has one view and so no routing: what Flask would look up for each request is known.
    """
    from flask import Flask, request

    handle = handler.module.handle
    context = handler.context
    with_event = handler.shape.handle_arguments == 2

    class FunctionApp(Flask):
        def create_url_adapter(self, request: Request | None) -> None:
            return None

        def dispatch_request(self, *_: Any) -> Any:
            mine = request._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001  # a stream outlives Flask's context
            return as_response(handle(Event(mine), context) if with_event else handle(mine))

    app = FunctionApp(_PACKAGE, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = body_limit_bytes
    app.config["MAX_FORM_MEMORY_SIZE"] = body_limit_bytes
    return app


def as_response(result: Any) -> Any:
    """What Flask accepts, of what a handler returned.

    ``{"statusCode", "body", "headers"}`` is the template's answer; any other dict or list is JSON; an
    iterator (as the whole result or as body) streams; the rest is Flask's business.
    """
    if result is None:
        return "", 200
    if isinstance(result, dict) and (result.keys() & {"statusCode", "body", "headers"} or not result):
        return _body(result.get("body")), _status(result.get("statusCode", 200)), _headers(result.get("headers"))
    if isinstance(result, Iterator):
        return _stream(result)
    return bytes(result) if isinstance(result, (bytearray, memoryview)) else result


def _status(code: Any) -> int:
    """A final status: a caller would wait for more after any other."""
    number = int(code)
    if not 200 <= number <= 599:
        raise ValueError(f"statusCode {code!r} ends no answer: use 200 to 599")
    return number


def _body(body: Any) -> Any:
    if body is None:
        return ""
    if isinstance(body, (dict, list)):
        from flask import jsonify

        return jsonify(body)
    if isinstance(body, Iterator):
        return _stream(body)
    if isinstance(body, (bytearray, memoryview)):
        return bytes(body)
    return body if isinstance(body, (str, bytes)) else str(body)


def _headers(headers: Any) -> list[tuple[str, str]]:
    if not headers:
        return []
    pairs: Iterable[Any] = headers.items() if isinstance(headers, dict) else headers
    return [(str(name), str(value)) for name, value in pairs]


def _stream(chunks: Iterator[Any]) -> Any:
    from flask import Response

    return Response(chunk if isinstance(chunk, bytes) else str(chunk).encode() for chunk in chunks)
