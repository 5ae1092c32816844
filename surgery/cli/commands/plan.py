"""The command `surgery plan`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ...recipe.builtin import recipe_file
from ..options import DTYPE, FILE, JSON, LINK, MEMORY, QUIET, RECIPE, REVISION, options
from ..options import given as given_paths
from ..screen import Screen


@click.command(short_help="What a recipe would change, from headers only.")
@RECIPE
@click.argument("source")
@options(
    click.option("--out", type=FILE, help="Also check that this output can be created."),
    LINK, DTYPE, REVISION, MEMORY, QUIET, JSON,
)  # fmt: skip
def plan(recipe, source, out, link, dtype, revision, memory, quiet, json_file) -> int:
    """Print which tensors and files RECIPE would add, change and keep in SOURCE. Reads headers only, writes nothing.

    RECIPE is the name of one that comes with surgery (`surgery recipes`), or a file.
    """
    recipe = recipe_file(recipe)
    require_result_file(json_file, "--json", given_paths(recipe, source, out))
    from ...verbs.plan import plan as verb
    from ..show.plan import planned, show_plan

    result = verb(recipe, source, out=out, link=link, dtype=dtype, revision=revision, memory=memory).to_dict()
    write_result(json_file, "--json", json_text(result))
    screen = Screen(quiet, json_file)
    show_plan(screen.tables, result)
    screen.end(planned(result))
    return 0
