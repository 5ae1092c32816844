"""`surgery plan`: what a recipe will change, from headers and the meta device only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..anatomy.sites import parse_config
from ..checkpoint.source import Source, has_tokenizer, open_source
from ..live.loading import load_tokenizer
from ..recipe import Recipe
from ..recipe.file import load_recipe
from ..steps.inputs import require_tools, resolve_prefix, vocabulary_size
from ..steps.plan import Plan, make_plan


@dataclass(frozen=True)
class Prepared:
    """A plan and the source's tokenizer (None where it is not needed)."""

    plan: Plan
    tokenizer: object | None


def prepare(
    recipe: Recipe | Path | str,
    source: str,
    out: Path | None,
    *,
    needs_tokenizer: bool,
    link: bool,
    dtype: str | None,
    revision: str | None,
) -> Prepared:
    """Read recipe and source, resolve the prefix, make the plan; raises whatever a later step would refuse."""
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    opened = open_source(str(source), revision=revision, dtype=dtype)
    parse_config(opened.config)  # before the tokenizer, which would complain in its own words
    prefix = () if recipe.attention_bias is None else recipe.attention_bias.prefix
    texts_in_prefix = prefix != "auto" and any(isinstance(token, str) for token in prefix)
    wanted = needs_tokenizer or texts_in_prefix or has_tokenizer(opened.companions)
    tokenizer = source_tokenizer(opened) if wanted else None
    vocab_size = vocabulary_size(opened.layout, opened.config)
    resolved = None if prefix == "auto" else resolve_prefix(prefix, tokenizer, vocab_size)
    bos = None if tokenizer is None else tokenizer.bos_token_id
    folds_bos = bos is not None and (resolved is None or bos in resolved)
    return Prepared(make_plan(opened, recipe, resolved, out, link, folds_bos), tokenizer)


def plan(
    recipe: Recipe | Path | str,
    source: str,
    *,
    out: Path | None = None,
    link: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
) -> Plan:
    """The exact list of tensors and files that `recipe` will change in `source`. Reads headers only, writes nothing."""
    found = prepare(recipe, source, out, needs_tokenizer=False, link=link, dtype=dtype, revision=revision).plan
    require_tools(found.recipe.verify, "cpu")
    return found


def source_tokenizer(source: Source):
    """The source's tokenizer; SourceError if it has none that loads."""
    if source.kind == "gguf":
        return load_tokenizer(source.root.parent, gguf_file=source.root.name)
    return load_tokenizer(source.root)
