"""The command `surgery seal`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..options import FILE, JSON, SIGN, options
from ..options import given as given_paths
from ..show.console import output


@click.command()
@click.argument("checkpoint", type=FILE)
@options(SIGN, JSON)
def seal(checkpoint, sign, json_file) -> int:
    """Take edited documents and generation settings of the converted CHECKPOINT into its manifest."""
    require_result_file(json_file, "--json", given_paths(checkpoint, sign))
    from ...verbs.seal import seal as verb
    from ..show.progress import TerminalReporter

    sealed = verb(checkpoint, sign, TerminalReporter())
    write_result(json_file, "--json", json_text(sealed))
    console = output()
    for name, what in sealed["changed"].items():
        console.print(f"{what}: {name}", markup=False)
    if not sealed["changed"]:
        console.print("Nothing was edited.")
    console.print(f"Digest: {sealed['digest']}", markup=False)
    if sealed["signature"] is not None:
        console.print(f"Signed: by the key {sealed['signature']}", markup=False)
    return 0
