"""`gpufn help`: what ``--help`` shows, asked for the other way round."""

from __future__ import annotations

import click


@click.command()
@click.argument("words", metavar="[COMMAND]...", nargs=-1)
@click.pass_context
def command(context: click.Context, words: tuple[str, ...]) -> None:
    """Show what gpufn, or one of its commands, is for and takes."""
    group = context.find_root().command
    group.main([*words, "--help"], prog_name="gpufn", standalone_mode=False, color=context.color)
