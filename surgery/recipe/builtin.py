"""The recipes that come with surgery, by name, and what a recipe that is given as text stands for.

A wheel holds them in the package; a copy of the repository, or an editable installation of it, beside the package.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ..errors import RecipeError
from ..words import shortened, visible_name

ENDINGS = (".yaml", ".yml")


def builtin() -> dict[str, Path]:
    """Name -> file of every recipe that comes with surgery, by name."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def summary(text: str) -> str:
    """What a recipe is for: its first line, which is a comment."""
    return text.partition("\n")[0].removeprefix("#").strip()


def recipe_file(given: Path | str) -> Path:
    """The file that a recipe is read from.

    A Path is a file. So is a text with a slash, or one that ends as YAML does. Any other is the name of a recipe that
    comes with surgery, and only where there is none of that name a file. RecipeError where it is neither.
    """
    if isinstance(given, Path) or "/" in given or given.endswith(ENDINGS):
        return Path(given)
    known = builtin()
    if given in known:
        if os.path.isfile(given):
            warnings.warn(f"{given} is the recipe of that name; the file is ./{given}", stacklevel=2)
        return known[given]
    if os.path.exists(given):
        return Path(given)
    name = shortened(visible_name(given), 60)
    raise RecipeError(f"{name}: no such file, and no recipe of that name; known are {', '.join(known) or 'none'}.")


def recipe_named(name: str) -> Path:
    """The file of a recipe that comes with surgery; RecipeError where none has this name."""
    known = builtin()
    if name not in known:
        shown = shortened(visible_name(name), 60)
        raise RecipeError(f"no recipe of surgery's is called {shown}; known are {', '.join(known) or 'none'}.")
    return known[name]
