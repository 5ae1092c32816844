"""The command `surgery push`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..options import FILE, JSON, QUIET, options
from ..screen import Screen


@click.command(short_help="Send a converted checkpoint to the hub.")
@click.argument("checkpoint", type=FILE)
@click.argument("to", metavar="ID")
@options(QUIET, JSON)
def push(checkpoint, to, quiet, json_file) -> int:
    """Push the converted CHECKPOINT to ID on the hub, owner/name or owner/name@branch, if its files are as written."""
    require_result_file(json_file, "--json", [checkpoint])
    from ...verbs.push import push as verb
    from ..show.plan import show_pushed

    screen = Screen(quiet, json_file)
    pushed = verb(checkpoint, to, screen.reporter)
    write_result(json_file, "--json", json_text(pushed))
    show_pushed(screen.tables, pushed)
    screen.end(f"pushed: {pushed['id']}, commit {pushed['revision']}")
    return 0
