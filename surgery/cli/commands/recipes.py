"""The command `surgery recipes`."""

from __future__ import annotations

import click

from ...checkpoint.results import json_text, require_result_file, write_result
from ...recipe.builtin import builtin, recipe_named, summary
from ..options import JSON, options
from ..show.console import output


@click.command()
@click.argument("name", required=False)
@options(JSON)
def recipes(name, json_file) -> int:
    """List the recipes that come with surgery, or print the one called NAME: to run it as it is, or to start from."""
    files = builtin() if name is None else {name: recipe_named(name)}
    require_result_file(json_file, "--json", files.values())
    texts = {known: path.read_text(encoding="utf-8") for known, path in files.items()}
    found = [{"name": known, "summary": summary(text), "text": text} for known, text in texts.items()]
    write_result(json_file, "--json", json_text({"recipes": found}))
    if name is not None:
        click.echo(texts[name], nl=False)
        return 0
    from ..show.recipes import show_recipes

    show_recipes(output(), found)
    return 0
