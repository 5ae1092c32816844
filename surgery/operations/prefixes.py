"""Which prefixes can be folded: tokens that texts name, and what an encoder of text takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..anatomy.classes import ANY, of_auto
from ..anatomy.sites import Anatomy
from ..errors import SourceError, UnsupportedModel
from ..live.text import around, no_longer_added, token_texts, tokenize
from .base import Target


def one_token(text: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id of a text that is exactly one token; SourceError for any other."""
    assert tokenizer is not None  # `needs_tokenizer`
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return vocabulary[text]
    ids = tokenize(tokenizer, text)
    if ids == [tokenizer.unk_token_id]:
        raise SourceError(
            f"attention_bias.prefix: {text!r} is not in the vocabulary; give another token, or a token id."
        )
    if len(ids) != 1:
        raise SourceError(
            f"attention_bias.prefix: {text!r} is not one token of the vocabulary but {len(ids)} ({ids[:8]}); "
            "list its tokens one by one, or give token ids."
        )
    return ids[0]


def require_constant(anatomy: Anatomy, searches: bool) -> None:
    """UnsupportedModel for an encoder in which no prefix is constant, or whose text cannot be moved."""
    if anatomy.sees_all:
        raise UnsupportedModel(
            f"{anatomy.model_type}: each of its tokens sees all others, so that no prefix is constant; give 'from' "
            "in place of 'prefix'"
        )
    if searches:
        raise UnsupportedModel(
            f"{anatomy.model_type}: is an encoder, and a prefix is searched by what a language model predicts; "
            "list the tokens, as that which its tokenizer puts first"
        )
    if "position_ids" not in inspect.signature(anatomy.blank.get_submodule(anatomy.trunk).forward).parameters:
        raise UnsupportedModel(
            f"{anatomy.model_type}: {anatomy.trunk_class} takes no position_ids, so its text cannot be shifted to "
            "after the prefix"
        )
    if anatomy.model_class is not of_auto(ANY, anatomy.config_class):
        raise UnsupportedModel(
            f"{anatomy.model_type}: {anatomy.model_class.__name__} may look at the first token id itself, as "
            "OWL-ViT's detection does, which would be another one; convert what AutoModel loads"
        )


def require_alone(target: Target, prefix: Sequence[int]) -> None:
    """UnsupportedModel where the tokenizer would go on putting a token before each text that slots hold too."""
    tokenizer = target.tokenizer
    if tokenizer is None:
        return
    kept = around(tokenizer)[0][len(no_longer_added(tokenizer, prefix)) :]
    if both := [token for token in kept if token in prefix]:
        said = token_texts(tokenizer, both[:1])[0]
        raise UnsupportedModel(
            f"{target.anatomy.model_type}: the tokenizer puts {said!r} before each text, and would go on doing so, "
            "as it is not its BOS; fold BOS alone"
        )
