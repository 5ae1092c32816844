"""The recipes that come with surgery."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from .tables import new_table


def show_recipes(console: Console, recipes: Sequence[dict]) -> None:
    table = new_table("Recipes", "name", "what it does", words=2)
    for recipe in recipes:
        table.add_row(recipe["name"], escape(recipe["summary"]))
    console.print(table)
    console.print("\nRun one:  surgery run NAME SOURCE OUT --text FILE", markup=False)
    console.print("Change it: surgery recipes NAME > my.yaml", markup=False)
