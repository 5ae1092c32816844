"""The command `surgery pretrain`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ...recipe.builtin import recipe_file
from ..options import FILE, JSON, QUIET, RECIPE, options
from ..options import given as given_paths
from ..screen import Screen


@click.command(short_help="Train small models from nothing.")
@RECIPE
@click.argument("out", type=FILE)
@options(
    click.option("--text", multiple=True, type=FILE, metavar="FILE", help="Text to train on, UTF-8 (repeatable)."),
    click.option(
        "--held-out", multiple=True, type=FILE, metavar="FILE",
        help="Text to judge on (repeatable); else the first sequences of --text.",
    ),
    QUIET, JSON,
)  # fmt: skip
def pretrain(recipe, out, text, held_out, quiet, json_file) -> int:
    """Train the small models of RECIPE from nothing; checkpoints and curves go to the new directory OUT.

    RECIPE is the name of one that comes with surgery (`surgery recipes`), or a file.
    """
    recipe = recipe_file(recipe)
    require_result_file(json_file, "--json", given_paths(recipe, out, *text, *held_out))
    from ...verbs.pretrain import pretrain as verb
    from ..show.pretrain import show_curves

    screen = Screen(quiet, json_file)
    result = verb(recipe, out, text=text, held_out=held_out, reporter=screen.reporter)
    write_result(json_file, "--json", json_text(result))
    show_curves(screen.tables, result, out)
    screen.end(f"trained: {', '.join(result['variants'])}; written to {out}")
    return 0
