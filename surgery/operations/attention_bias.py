"""Fold a token prefix into k', v' (EAB): what the prefix looks like to the text is constant, so it can be stored.

The first tokens of a causal model see only themselves. Their keys (after rotary and norms) and values are therefore the
same whatever follows, and attention over [prefix, text] equals attention over the text with those keys and values as
slots. Exact.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_validator, model_serializer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..anatomy.sites import Anatomy
from ..checkpoint.layout import Stored
from ..converted.card import Section
from ..converted.described import Described, damaged
from ..errors import SourceError
from ..live.graft import Fold, eab_config, fold, grafted, held_parts
from ..live.model import Live
from ..live.text import token_texts
from ..parts import every_shape
from ..parts import shapes as declared
from ..recipe.fields import Prefix
from ..words import count_of, listing, quoted
from .base import Changes, Exact, Fitting, NothingToDo, Operation, Stand, Target, Trained
from .prefix_search import PrefixSearch
from .prefixes import one_token, require_alone, require_constant

VISIBLE = {
    "as_prefix": "In exact arithmetic the model computes what the original computes after that prefix. The prefix is "
    "never computed, nor are massive activations on it.",
    "always": "Every query sees them, also where a layer's window would have hidden the prefix: there the model "
    "differs from the original on purpose.",
}


@dataclass(frozen=True)
class Folded:
    """The prefix with its slots, and what was tried to find it, if the recipe left that to a search."""

    fold: Fold
    search: dict[str, Any] | None = None


class AttentionBias(Operation):
    """Fold a token prefix into learnable key/value slots k', v' at every attention site.

    `prefix`: "auto" searches for the tokens, at most `max_slots` of them; otherwise the tokens in order, each the text
    of one token or its id. `slots_visible`: "as_prefix" shows a slot to a query exactly where the model's own mask
    would have shown the prefix token; "always" shows it to every query, which is not exact for windowed layers.
    """

    name: ClassVar[str] = "attention_bias"
    example: ClassVar[str] = "{prefix: auto}"
    adds: ClassVar[bool] = True

    prefix: Annotated[Prefix, Field(description="the tokens to fold, each a text or an id; auto searches for them")] = (
        "auto"
    )
    max_slots: Annotated[int, Field(ge=1, le=16, description="how many tokens the search may take")] = 4
    slots_visible: Annotated[
        Literal["as_prefix", "always"],
        Field(description="to which queries: those that would have seen the prefix, or always, as streaming wants"),
    ] = "as_prefix"

    @field_validator("max_slots")
    @classmethod
    def _only_for_a_search(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("prefix", "auto") != "auto":
            raise ValueError("bounds the search that 'prefix: auto' makes, but the prefix is given; remove one of them")
        return value

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = plain(self)
        if self.prefix != "auto":
            del fields["max_slots"]
        return fields

    @property
    def exact(self) -> Exact:
        return "rounding"

    def exact_on(self, config: PreTrainedConfig, length: int) -> bool:
        """Slots that are always visible differ from a prefix where a window or chunk does not hold all of both."""
        if self.slots_visible != "always":
            return True
        text = config.get_text_config()
        windows = (getattr(text, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
        return not any(0 < window < length for window in windows)

    @property
    def needs_tokenizer(self) -> bool:
        return self.prefix != "auto" and any(isinstance(token, str) for token in self.prefix)

    @property
    def most_positions(self) -> int:
        return self.max_slots if self.searches else len(self.prefix)

    @property
    def searches(self) -> bool:
        return self.prefix == "auto"

    def as_found(self, described: Described) -> Self:
        if self.prefix != "auto":
            return self
        found = described.eab.prefix_ids
        if not 0 < len(found) <= self.max_slots:
            said = f"eab.prefix_ids holds {len(found)} tokens, and the recipe searches for 1 to {self.max_slots}"
            raise damaged(described.root, said)
        return self.model_copy(update={"prefix": found})

    def plan(self, target: Target, parts: Folded | None = None) -> Changes:
        if target.anatomy.patching is not None:
            require_constant(target.anatomy, self.searches)
            require_alone(target, self._prefix(target) or ())
        prefix = self._prefix(target) if parts is None else parts.fold.prefix
        n = self.max_slots if prefix is None else len(prefix)
        told, few = (n, "") if prefix is not None else ({"max": n}, "up to ")
        slots = f"{few}{count_of(n, 'slot')}"
        anatomy = target.anatomy
        mixers = count_of(len(anatomy.mixers), "mixer")
        return Changes(
            added={
                f"{anatomy.lead}{name}": Stored("F32", shape)
                for name, shape in every_shape(anatomy.eab(n, self.slots_visible)).items()
            },
            config={"eab": eab_config(anatomy, prefix or (), self.slots_visible)},
            parts=frozenset({"slots"}),
            prefix=prefix,
            positions=n,
            told={
                "n_slots": told,
                **{
                    key: len(found)
                    for key, found in (("mixers", anatomy.mixers), ("indexers", anatomy.indexers))
                    if found
                },
            },
            words=(
                f"{slots} in each of {count_of(len(anatomy.sites), 'attention site')}",
                *([f"the prefix's inputs in {mixers}"] if anatomy.mixers else []),
                *([f"its keys in {count_of(len(anatomy.indexers), 'indexer')}"] if anatomy.indexers else []),
            ),
            trains=(
                Trained("slots", told, f"{slots} at each site", "the slots"),
                *(
                    [Trained("mixers", len(anatomy.mixers), f"what {mixers} remember", "remembered inputs")]
                    if anatomy.mixers
                    else []
                ),
            ),
        )

    def _prefix(self, target: Target) -> tuple[int, ...] | None:
        """Token ids of the recipe's prefix; None where they are to be searched."""
        if self.prefix == "auto":
            return None
        size, tokenizer = target.vocab_size, target.tokenizer
        ids = tuple(one_token(token, tokenizer) if isinstance(token, str) else token for token in self.prefix)
        if beyond := [token for token in ids if token >= size]:
            raise SourceError(
                f"attention_bias.prefix: token id {beyond[0]} is not in the vocabulary of {size}; give a smaller id."
            )
        return ids

    def fit(self, live: Live, text: Fitting) -> Folded:
        prefix, search = text.planned.prefix, None
        if prefix is None:
            prefix, search = text.once("search", lambda: self._search(live, text))
        text.reporter.step("fold the prefix")
        return Folded(fold(live, prefix, self.slots_visible), search)

    def _search(self, live: Live, text: Fitting) -> tuple[tuple[int, ...], dict[str, Any]]:
        assert text.target.tokenizer is not None  # or the recipe has been refused
        text.reporter.step(f"search for a prefix of up to {self.max_slots} tokens")
        with text.reporter.bar("search", None) as advance:
            searching = PrefixSearch(live, text.target.tokenizer, text.chunks, self.slots_visible, advance)
            # Slots that are always visible are sinks for a window too, of which a model without spikes may have need.
            if self.slots_visible == "as_prefix" and not searching.finds_any():
                raise NothingToDo(
                    "the original has no massive activations on the calibration text, so no prefix is worth folding; "
                    "list one to fold it all the same, or leave attention_bias out"
                )
            best = searching.run(self.max_slots)
        text.reporter.note(
            f"prefix {searching.shown(best.prefix)} leaves {best.massive} massive activations on the calibration text"
        )
        return best.prefix, searching.to_dict()

    def graft(self, live: Live, parts: Folded) -> contextlib.AbstractContextManager[object]:
        return grafted(live, parts.fold)

    def held(self, live: Live, parts: Folded) -> Folded:
        return Folded(held_parts(live, parts.fold), parts.search)

    def tensors(self, live: Live, parts: Folded) -> Mapping[str, torch.Tensor]:
        return {
            f"{live.anatomy.lead}{name}": tensor.to("cpu", torch.float32).contiguous()
            for name, tensor in parts.fold.tensors.items()
        }

    @classmethod
    def asks(cls, described: Described) -> Mapping[str, Mapping[str, Stored]]:
        return {
            kind.name: {name: Stored("F32", shape) for name, shape in shapes.items()}
            for kind, shapes in declared(described.eab.to_dict()).items()
        }

    def found(self, parts: Folded, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        ids = parts.fold.prefix
        tokens = None if tokenizer is None else token_texts(tokenizer, ids)
        search = {} if parts.search is None else {"prefix_search": parts.search}
        return {"prefix": {"ids": list(ids), "tokens": tokens}, **search}

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (prefix := verdict.get("prefix")):
            return None
        if tokens := prefix.get("tokens"):
            ids = f"{'id' if len(tokens) == 1 else 'ids'} {listing(prefix['ids'], 16)}"
            return (
                f"Folded into the slots: the {'token' if len(tokens) == 1 else 'tokens'} {quoted(tokens, 16)} ({ids})."
            )
        return f"Folded into the slots: the token ids {listing(prefix['ids'], 16)}."

    def says(self, parts: Folded, target: Target, recipe: Stand) -> Section:
        ids, n, tokenizer = parts.fold.prefix, len(parts.fold.prefix), target.tokenizer
        named = f"with ids {list(ids)}"
        if tokenizer is not None:
            named = ", ".join(f"`{json.dumps(text)}`" for text in token_texts(tokenizer, ids))
        visible = VISIBLE[self.slots_visible]
        if not recipe.exact and self.slots_visible == "as_prefix":
            visible = "Without what follows, the model would compute what the original computes after that prefix."
        belong = "Position 0 belongs" if n == 1 else f"Positions 0 to {n - 1} belong"
        places = f"{belong} to the prefix, so the longest text is {count_of(n, 'token')} shorter."
        if tokenizer is not None and tokenizer.bos_token_id in ids:
            places += " The BOS token is among the slots; the tokenizer no longer adds it."
        return Section(
            tag="attention-bias",
            title="explicit attention bias",
            adds="slots",
            text=f"an **explicit attention bias**: {count_of(n, 'constant key/value pair')} k', v' in each of "
            f"{len(target.anatomy.sites)} attention sites, folded from the token prefix {named}. "
            f"{_of_others(target.anatomy)}{visible}",
            loading="Do not put the prefix in front of the text: it is inside.",
            limits=f"{places} Rows of `output_attentions` sum to less than 1: the rest is the slots'. Inside "
            "`with model.slot_attentions():` they have columns of their own, in front.",
        )


def _of_others(anatomy: Anatomy) -> str:
    said = ""
    if anatomy.mixers:
        said += (
            f"What the prefix gave to {count_of(len(anatomy.mixers), 'module')} with a state (state space, linear "
            "attention, convolution) is stored as well, and given to them again where a text begins. "
        )
    if anatomy.indexers:
        indexers = count_of(len(anatomy.indexers), "indexer")
        said += f"So are its keys in {indexers}, which choose what sparse attention sees. "
    return said
