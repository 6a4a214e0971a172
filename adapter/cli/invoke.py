"""`gpufn invoke`: call a function; its answer to standard output as it comes, how long it took to standard error."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import click

from adapter.cli.output import note
from adapter.cli.scope import DEFAULT_NAMESPACE, namespace_option, split_name
from adapter.cli.state import error_of, gateway_option, send
from adapter.errors import AdapterError, ConfigError
from adapter.keys import CALL_ID_HEADER, CALLBACK_HEADER, START_PATH_HEADER
from adapter.units import format_duration

_CONNECT_S = 10


@click.command()
@click.argument("name")
@click.option(
    "-d", "--data", metavar="TEXT|@FILE|-",
    help="Request body: a text, a file, or - for standard input, which is read anyway where it is no terminal.",
)  # fmt: skip
@click.option("-i", "--input", "inputs", multiple=True, metavar="KEY=VALUE", help="A field of a JSON body; repeatable.")
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME: VALUE", help="A request header; repeatable.")
@click.option("-X", "--method", default="POST", show_default=True, help="HTTP method.")
@click.option("--path", default="/", show_default=True, help="What the function sees as its path, query included.")
@click.option("--async", "later", is_flag=True, help="Only queue it; see --callback.")
@click.option("--callback", metavar="URL", help="Where the answer of an asynchronous call is sent.")
@click.option("--timeout", "timeout_s", default=330.0, show_default=True, metavar="SECONDS", help="Longest silence.")
@namespace_option
@gateway_option
def command(
    name: str,
    data: str | None,
    inputs: tuple[str, ...],
    headers: tuple[str, ...],
    method: str,
    path: str,
    later: bool,
    callback: str | None,
    timeout_s: float,
    namespace: str,
    gateway: str,
) -> None:
    """Call the function NAME.

    No credentials are sent: functions are called without, and must not see them.
    """
    import requests

    route = "async-function" if later else "function"
    name, namespace = split_name(name, namespace)
    key = name if namespace == DEFAULT_NAMESPACE else f"{name}.{namespace}"
    sent = _headers(headers, callback)
    body = _body(data, inputs, sent)
    with requests.Session() as session:
        session.trust_env = False
        began = time.monotonic()
        response = send(
            session, method.upper(), f"{gateway.rstrip('/')}/{route}/{key}/{path.lstrip('/')}",
            data=body, headers=sent, stream=True, timeout=(_CONNECT_S, timeout_s), allow_redirects=False,
        )  # fmt: skip
        if response.status_code >= 400 and response.headers.get("X-OpenFaaS-Internal"):
            raise error_of(response)  # ours, not the function's
        _copy(response, began)
        note(_timing(response, time.monotonic() - began))
    if response.status_code >= 400:
        raise AdapterError(
            f"{key} answered {response.status_code}.",
            why="Its answer is on standard output.",
            hint=f"See its log: gpufn logs {key}",
            code=f"http-{response.status_code}",
        )


def _headers(texts: tuple[str, ...], callback: str | None) -> dict[str, str]:
    headers = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon:
            raise click.BadParameter(f"{text!r} is not NAME: VALUE.", param_hint="'--header'")
        headers[name.strip()] = value.strip()
    if callback is not None:
        headers[CALLBACK_HEADER] = callback
    return headers


def _body(data: str | None, inputs: tuple[str, ...], headers: dict[str, str]) -> bytes | BinaryIO:
    """The request body; tells `headers` its type where that is known."""
    if inputs:
        if data is not None:
            raise click.UsageError("Give either --data or --input.")
        headers.setdefault("Content-Type", "application/json")
        return json.dumps(dict(_field(text) for text in inputs)).encode()
    if data == "-" or (data is None and not sys.stdin.isatty()):
        return sys.stdin.buffer.read()
    if data is not None and data.startswith("@"):
        try:
            return Path(data[1:]).read_bytes()
        except OSError as exc:
            raise ConfigError(f"{data[1:]} cannot be read.", why=f"{exc.strerror}.", code="bad-file") from exc
    return (data or "").encode()


def _field(text: str) -> tuple[str, Any]:
    """A value is JSON where it is any (``3``, ``true``, ``[1,2]``), else a text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE.", param_hint="'--input'")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _copy(response: Any, began: float) -> None:
    """To standard output, each piece when it is here. Raises `AdapterError` where the answer breaks off."""
    import requests

    last = b"\n"
    try:
        for piece in response.iter_content(None):
            last = piece[-1:] or last
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    except requests.RequestException as exc:
        seconds = format_duration(time.monotonic() - began)
        raise AdapterError(f"The answer broke off after {seconds}.", why=f"{exc}.", code="answer-broken") from exc
    if sys.stdout.isatty() and last != b"\n":
        note("")


def _timing(response: Any, seconds: float) -> str:
    """``✓ 200 in 85ms (cold: restore)  call id …``."""
    rung = response.headers.get(START_PATH_HEADER)
    cold = f" (cold: {rung})" if rung else ""
    sign = "✓" if response.status_code < 400 else "✗"
    call_id = response.headers.get(CALL_ID_HEADER, "")
    return f"{sign} {response.status_code} in {format_duration(seconds)}{cold}  call id {call_id}"
