"""The command `surgery clean`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ..options import FILE, JSON, QUIET, options
from ..screen import Screen


@click.command(short_help="Remove what killed runs left behind.")
@click.argument("directory", type=FILE, required=False)
@options(click.option("--dry-run", is_flag=True, help="Only list what would be removed."), QUIET, JSON)
def clean(directory, dry_run, quiet, json_file) -> int:
    """Remove what killed runs left in DIRECTORY, which holds their outputs, and among temporary files.

    What a running process works in stays.
    """
    require_result_file(json_file, "--json")
    from ...verbs.clean import clean as verb
    from ..show.clean import cleaned, show_clean

    result = verb(directory, dry_run=dry_run)
    write_result(json_file, "--json", json_text(result))
    screen = Screen(quiet, json_file)
    show_clean(screen.tables, result, dry_run)
    screen.end(cleaned(result, dry_run))
    return 0
