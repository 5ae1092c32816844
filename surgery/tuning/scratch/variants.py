"""A small GPT-2 and its variants, all with the same initial weights in what they share.

* plain: GPT-2. The first token of a sequence stands at position 0.
* sink_token: GPT-2 after one token that is the same in front of every sequence (Xiao et al., arXiv 2309.17453,
  section 3.3). It stands at position 0, is learned like any other, and nothing predicts it.
* attention_bias: slots k', v' at every site (Sun et al., arXiv 2402.17762, eq. 3), learned from random values. The text
  stands at positions after them, as in a converted checkpoint, and as after a sink token.
* head_norm: each head's output is normed before the output projection, by weights that are 1 at first and
  that the heads of a site share.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ...anatomy.sites import Anatomy, examine
from ...converted.derived import derive, load_derived
from ...converted.parts import NORMS, SLOTS
from ...live.graft import eab_config, head_norm_config
from ...live.model import Live
from .settings import Pretrain
from .tokenizer import SINK_ID


@dataclass(frozen=True)
class Variant:
    """A model to train; `lead` are token ids that stand in front of every sequence and belong to no text."""

    name: str
    live: Live
    lead: tuple[int, ...] = ()

    @property
    def model(self) -> PreTrainedModel:
        return self.live.model


def base_config(settings: Pretrain, vocab_size: int) -> GPT2Config:
    """GPT-2 with room for `length` tokens after a sink token or slots; no dropout, so that variants differ in nothing
    but what they are."""
    size = settings.model
    return GPT2Config(
        vocab_size=vocab_size, n_embd=size.width, n_layer=size.blocks, n_head=size.heads,
        n_positions=settings.length + max(settings.slots, 1), embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def initial_weights(config: GPT2Config, seed: int) -> dict[str, torch.Tensor]:
    """Of a plain GPT-2, as transformers initialises it from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(copy.deepcopy(config)).state_dict()


def build(
    name: str, config: GPT2Config, weights: dict[str, torch.Tensor], *, slots: int = 1, seed: int = 0
) -> Variant:  # fmt: skip
    """The variant `name`, untrained; `slots` are those of attention_bias at each site, drawn from `seed`."""
    config, anatomy = copy.deepcopy(config), examine(config.to_dict())
    if name in ("plain", "sink_token"):
        lead = (SINK_ID,) if name == "sink_token" else ()
        config.bos_token_id = SINK_ID if lead else None
        model: PreTrainedModel = GPT2LMHeadModel(config)
        model.load_state_dict(weights)
        return Variant(name, Live(model, anatomy), lead)
    model = _derived(config, anatomy, slots if name == "attention_bias" else 0, name == "head_norm")
    own = [key for key in model.state_dict() if ".attention_bias." in key or ".head_norm." in key]
    model.load_state_dict({**weights, **{key: model.state_dict()[key] for key in own}})
    live, generator = Live(model, anatomy), torch.Generator().manual_seed(seed)
    for site in anatomy.sites:
        module: Any = live.trunk.get_submodule(site.name)
        for parameter in module.attention_bias.parameters():
            torch.nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        if name == "head_norm":
            torch.nn.init.ones_(module.head_norm.weight)
    return Variant(name, live)


def _derived(config: GPT2Config, anatomy: Anatomy, slots: int, normed: bool) -> PreTrainedModel:
    """The class of a converted checkpoint, so that it is saved and loads as one."""
    parts = frozenset({NORMS if normed else SLOTS})
    derived, module = derive(config.model_type, parts), load_derived(config.model_type, parts)
    # No prefix was folded: the slots hold what training makes of them.
    entries = {"eab": {**eab_config(anatomy, (), "as_prefix"), "n_slots": slots}}
    if normed:
        entries["head_norm"] = head_norm_config(anatomy, range(len(anatomy.blocks)), per_head=False, gated=False)
    settings = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    return getattr(module, derived.causal_class)(getattr(module, derived.config_class)(**settings, **entries))
