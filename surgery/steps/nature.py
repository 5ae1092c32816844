"""What a source is taken for, before its weights are read: a language model, or an encoder, and its tokenizer."""

from __future__ import annotations

import json
import warnings
from typing import Any

from ..anatomy.classes import has_encoder, has_text_tower, is_text, sees_or_hears
from ..anatomy.fit import Fit, encoder_stored, examine_stored
from ..anatomy.patching import Reads
from ..anatomy.sites import Anatomy, examine
from ..checkpoint.gguf_tokenizer import write_tokenizer
from ..checkpoint.source import Source, has_tokenizer, without_tokenizer
from ..endings.temporary import temporary
from ..errors import SourceError, UnsupportedModel
from ..live.loading import load_tokenizer
from ..operations.base import Port
from .recipe import Recipe


def port_of(source: Source, recipe: Recipe | None = None, reads: Reads | None = None) -> tuple[Port, Reads | None]:
    """What the source is taken for: a language model, if it is one and nothing in the recipe is for encoders, or else
    an encoder; and of what, where that is decided: a prefix is of text, and so is all that is given to an encoder of
    nothing else. `reads`: what it is to be given, where that is known."""
    if source.kind == "gguf":
        return "text", "text"
    config, of_text = source.config, reads == "text"
    folds = recipe is not None and any(change.most_positions for change in recipe.changes)
    asked = None if recipe is None else recipe.reading
    if is_text(config) and (folds or of_text or asked != "images"):
        return "text", "text"
    port = "images" if has_encoder(config) else asked or "images"  # what is neither says so itself
    both = sees_or_hears(config) or is_text(config)
    if not both or (folds or of_text) and has_text_tower(config):
        return port, "text"
    return port, None if of_text else reads


def examine_source(
    source: Source, port: Port = "text", reads: Reads | None = None
) -> tuple[Anatomy, Fit]:  # fmt: skip
    """What the source is, as a language model ("text"), or an encoder, of those that there are the one that `reads`
    this; and how its tensors fit that: those of a GGUF were named after its model.

    SourceError where a package is missing that reads its format.
    """
    if source.quantised is not None:
        source.quantised.require_loader(source.root)
    if source.blank is not None:
        return examine(source.config, source.blank), Fit()
    if port == "text":
        return examine_stored(source.config, source.layout)
    try:
        return encoder_stored(source.config, source.layout, reads)
    except UnsupportedModel:
        if reads in (None, "text"):
            raise
        return encoder_stored(source.config, source.layout)  # of what it reads, which is not what it was given


def with_tokenizer(source: Source, recipe: Recipe, wanted: bool, given: Reads) -> tuple[Source, Any]:
    """The source and its tokenizer. One that does not load, and is not `wanted`, is left out of the source. An encoder
    of images or sound has none, or that of a text tower beside it."""
    wanted, reads = wanted and given == "text", recipe.reads_text and given == "text"
    if not wanted and not has_tokenizer(source.companions):
        return source, None
    folder = source.root / "additional_chat_templates"
    if folder.is_dir():
        warnings.warn(
            f"{folder} is not carried along; put its templates into the chat_template of tokenizer_config.json.",
            stacklevel=3,
        )
    try:
        return source, source_tokenizer(source)
    except (SourceError, UnsupportedModel) as error:
        if wanted or reads:
            way_out = "" if reads else ", or list the prefix as ids and run --no-verify"
            raise type(error)(f"{str(error).removesuffix('.')}{way_out}.") from error
        warnings.warn(f"{str(error).rpartition('; ')[0]}; its files are left out.", stacklevel=3)
        return without_tokenizer(source), None


def source_tokenizer(source: Source):
    """The source's tokenizer; SourceError (UnsupportedModel for some of GGUF files) if it has none that loads."""
    if source.kind != "gguf":
        return load_tokenizer(source.root)
    if not has_tokenizer(source.companions):
        raise SourceError(f"{source.spec} holds no tokenizer; give a file that has one.")
    with temporary() as folder:  # as `run` will write it
        (folder / "config.json").write_text(json.dumps(source.config), encoding="utf-8")
        write_tokenizer(source.plan.header, folder)
        return load_tokenizer(folder, source.spec)
