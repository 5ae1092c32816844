"""The command `surgery push`."""

from __future__ import annotations

import click

from ..options import FILE
from ..show.console import output


@click.command()
@click.argument("checkpoint", type=FILE)
@click.argument("to", metavar="ID")
def push(checkpoint, to) -> int:
    """Push the converted CHECKPOINT to ID on the hub, owner/name or owner/name@branch, if its files are as written."""
    from ...verbs.push import push as verb
    from ..show.plan import show_pushed
    from ..show.progress import TerminalReporter

    show_pushed(output(), verb(checkpoint, to, TerminalReporter()))
    return 0
