"""Errors on a terminal: what happened, why, what to do; one line each, no traceback.

The wording comes from the error itself (`adapter.errors`); here it only gets its form.
"""

from __future__ import annotations

import click

from adapter.errors import AdapterError


def format_error(error: AdapterError) -> str:
    """``✗ message  [code]``, then why and hint, indented; empty parts are left out."""
    return error.to_text()


def report(error: AdapterError) -> int:
    """Print `error` on standard error; returns the exit code that belongs to it."""
    first, *rest = format_error(error).split("\n")
    click.secho(first, fg="red", err=True)
    for line in rest:
        click.echo(line, err=True)
    return error.exit_code
