"""`surgery plan`: what a recipe will change, from headers and the meta device only."""

from __future__ import annotations

from pathlib import Path

from ..live.memory import Place
from ..steps.plan import Plan, prepare
from ..steps.recipe import Given, load_recipe


def plan(
    recipe: Given,
    source: Path | str,
    *,
    out: Path | str | None = None,
    link: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    memory: int | None = None,
) -> Plan:
    """The exact list of tensors and files that `recipe` will change in `source`. Reads headers only, writes nothing.

    `memory`: bytes that a run on `device` may take, None for what is free.
    """
    recipe = load_recipe(recipe)
    found = prepare(
        recipe, str(source), None if out is None else Path(out), needs_tokenizer=False, link=link, dtype=dtype,
        revision=revision, place=Place(device, memory),
    )  # fmt: skip
    for gate in recipe.verify.gates():
        gate.require_tools("cpu")
    return found
