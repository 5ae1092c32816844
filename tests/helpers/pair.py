"""A model with and without slots: both sides of what the runtime promises."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import torch

from helpers.tiny import live_of, tiny_model
from surgery.converted.derived import load_derived
from surgery.live.graft import Fold, eab_config, fold, grafted

PREFIX = [5, 7, 9]
N = len(PREFIX)


class Pair:
    """An original model, its slots, and what it says about [prefix, text]."""

    def __init__(self, model, prefix=PREFIX):
        self.model, self.prefix = model, list(prefix)
        self.live = live_of(model)
        self.folded = fold(self.live, self.prefix, "as_prefix")

    @torch.no_grad()
    def control(self, ids, **arguments):
        """Logits of the original at the text behind the prefix."""
        before = torch.tensor([self.prefix] * len(ids))
        return self.model(input_ids=torch.cat([before, ids], 1), use_cache=False, **arguments).logits[
            :, len(self.prefix) :
        ]

    @contextlib.contextmanager
    def converted(self, visible="as_prefix", implementation="eab"):
        with grafted(self.live, replace(self.folded, visible=visible)), torch.no_grad():
            for config in {id(m.config): m.config for m in (self.model, self.model.base_model)}.values():
                config._attn_implementation_internal = implementation
            yield self.model


@functools.cache
def pair_of(family: str) -> Pair:
    """Shared, so leave it as it is."""
    return Pair(tiny_model(family))


def derived_model(family="llama", prefix=PREFIX, pair=None):
    """The class that a converted checkpoint loads, in float64, with the tiny model's weights and its folded slots.

    `pair`: another of that family than the shared one.
    """
    pair, module = pair or pair_of(family), load_derived(family)
    config = {**pair.model.config.to_dict(), "eab": eab_config(pair.live.anatomy, prefix, "as_prefix")}
    del config["model_type"]
    config_class, model_class = (vars(module)[f"Eab{c.__name__}"] for c in (type(pair.model.config), type(pair.model)))
    model = model_class(config_class(**config)).to(torch.float64).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped_mm knows no float64
    lost = model.load_state_dict(pair.model.state_dict(), strict=False)
    lead, folded = pair.live.anatomy.lead, pair.folded.tensors
    assert not lost.unexpected_keys and set(lost.missing_keys) == {f"{lead}{name}" for name in folded}
    model.load_state_dict({f"{lead}{name}": tensor for name, tensor in folded.items()}, strict=False)
    return model


def slots_of(folded: Fold) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Site -> its slots, key and value."""
    key, value = ".attention_bias.key", ".attention_bias.value"
    sites = [name.removesuffix(key) for name in folded.tensors if name.endswith(key)]
    return {site: (folded.tensors[f"{site}{key}"], folded.tensors[f"{site}{value}"]) for site in sites}


def padded(rows, side):
    """Rows of different lengths as one batch: ids, attention_mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


def counted(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def worst(got, expected):
    return (got.double() - expected.double()).abs().max().item()
