"""The command `surgery seal`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..options import FILE, JSON, QUIET, SIGN, options
from ..options import given as given_paths
from ..screen import Screen


@click.command(short_help="Take edited documents into the manifest.")
@click.argument("checkpoint", type=FILE)
@options(SIGN, QUIET, JSON)
def seal(checkpoint, sign, quiet, json_file) -> int:
    """Take edited documents and generation settings of the converted CHECKPOINT into its manifest."""
    require_result_file(json_file, "--json", given_paths(checkpoint, sign))
    from ...verbs.seal import seal as verb

    screen = Screen(quiet, json_file)
    sealed = verb(checkpoint, sign, screen.reporter)
    write_result(json_file, "--json", json_text(sealed))
    for name, what in sealed["changed"].items():
        screen.tables.print(f"{what}: {name}", markup=False)
    if not sealed["changed"]:
        screen.tables.print("Nothing was edited.")
    if sealed["signature"] is not None:
        screen.tables.print(f"Signed: by the key {sealed['signature']}", markup=False)
    screen.end(f"sealed: {sealed['digest']}")
    return 0
