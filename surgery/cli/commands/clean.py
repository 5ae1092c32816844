"""The command `surgery clean`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..options import FILE, JSON, options
from ..show.console import output


@click.command()
@click.argument("directory", type=FILE, required=False)
@options(click.option("--dry-run", is_flag=True, help="Only list what would be removed."), JSON)
def clean(directory, dry_run, json_file) -> int:
    """Remove what killed runs left in DIRECTORY, which holds their outputs, and among temporary files.

    What a running process works in stays.
    """
    require_result_file(json_file, "--json")
    from ...verbs.clean import clean as verb
    from ..show.clean import show_clean

    result = verb(directory, dry_run=dry_run)
    write_result(json_file, "--json", json_text(result))
    show_clean(output(), result, dry_run)
    return 0
