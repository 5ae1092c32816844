"""`surgery plan`: what a recipe will change, from headers and the meta device only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.source import Source, open_source
from ..errors import SourceError
from ..loading import load_tokenizer
from ..planning import Plan, make_plan
from ..recipe import Recipe, load_recipe
from .inputs import resolve_prefix


@dataclass(frozen=True)
class Prepared:
    """A plan and the source's tokenizer (None where it is not needed)."""

    plan: Plan
    tokenizer: object | None


def prepare(
    recipe: Recipe | Path | str, source: str, out: Path | None, *, needs_tokenizer: bool, link: bool, dtype: str | None, revision: str | None
) -> Prepared:
    """Read recipe and source, resolve the prefix, make the plan; raises whatever a later step would refuse."""
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    opened = open_source(str(source), revision=revision, dtype=dtype)
    prefix = recipe.operations[0].attention_bias.prefix
    texts_in_prefix = prefix != "auto" and any(isinstance(token, str) for token in prefix)
    tokenizer = source_tokenizer(opened) if needs_tokenizer or texts_in_prefix else None
    resolved = None if prefix == "auto" else resolve_prefix(prefix, tokenizer, _vocab_size(opened))
    return Prepared(make_plan(opened, recipe, resolved, out, link), tokenizer)


def plan(
    recipe: Recipe | Path | str, source: str, *, out: Path | None = None, link: bool = False, dtype: str | None = None, revision: str | None = None
) -> Plan:
    """The exact list of tensors and files that `recipe` will change in `source`. Nothing is read but headers, nothing written."""
    return prepare(recipe, source, out, needs_tokenizer=False, link=link, dtype=dtype, revision=revision).plan


def source_tokenizer(source: Source):
    """The source's tokenizer; SourceError if it has none that loads."""
    if source.kind == "gguf":
        return load_tokenizer(source.root.parent, gguf_file=source.root.name)
    return load_tokenizer(source.root)


def _vocab_size(source: Source) -> int:
    for info in source.layout.tensors.values():
        if info.name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")):
            return info.shape[0]
    return source.config.get("vocab_size", 2**31)
