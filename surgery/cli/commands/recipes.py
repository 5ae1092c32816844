"""The command `surgery recipes`."""

from __future__ import annotations

import click

from ...checkpoint.results import STDOUT, json_text, require_result_file, write_result
from ...recipe.builtin import builtin, recipe_named, summary
from ..options import JSON, QUIET, options
from ..screen import Screen


@click.command(short_help="List or print the recipes that come along.")
@click.argument("name", required=False)
@options(QUIET, JSON)
def recipes(name, quiet, json_file) -> int:
    """List the recipes that come with surgery, or print the one called NAME: to run it as it is, or to start from."""
    files = builtin() if name is None else {name: recipe_named(name)}
    require_result_file(json_file, "--json", files.values())
    texts = {known: path.read_text(encoding="utf-8") for known, path in files.items()}
    found = [{"name": known, "summary": summary(text), "text": text} for known, text in texts.items()]
    write_result(json_file, "--json", json_text({"recipes": found}))
    if name is None:
        from ..show.recipes import show_recipes

        screen = Screen(quiet, json_file)
        show_recipes(screen.tables, found)
        screen.end(f"{len(found)} recipes: {', '.join(texts)}")
    elif json_file != STDOUT:
        click.echo(texts[name], nl=False)
    return 0
