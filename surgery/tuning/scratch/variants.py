"""A small model and its variants, all with the same initial weights in what they share.

* plain: as the family is. The first token of a sequence stands at position 0.
* sink_token: the same after one token that is the same in front of every sequence (Xiao et al., arXiv 2309.17453,
  section 3.3). It stands at position 0, is learned like any other, and nothing predicts it.
* attention_bias: slots k', v' at every site (Sun et al., arXiv 2402.17762, eq. 3), learned from random values; in a
  hybrid each mixer remembers as many inputs. The text stands at positions after them, as in a converted checkpoint, and
  as after a sink token.
* head_norm: each head's output is normed before the output projection, by weights that are 1 at first and
  that the heads of a site share.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ...anatomy.classes import causal_class
from ...anatomy.parsed import parse_config
from ...anatomy.sites import Anatomy, examine
from ...converted.derived import derive, load_derived
from ...converted.parts import NORMS, SLOTS
from ...errors import SourceError, SurgeryError, brief
from ...live.graft import eab_config, head_norm_config
from ...live.model import Live
from .settings import Pretrain
from .tokenizer import SINK_ID

# Keys of config.json that follow from the recipe, or that have no place in it.
RESERVED = frozenset({
    "model_type", "vocab_size", "eab", "head_norm", "architectures", "auto_map", "dtype", "torch_dtype",
    "quantization_config", "attn_implementation", "_attn_implementation", "transformers_version", "_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip
DROPOUTS = ("dropout", "pdrop", "dropout_prob")
MLPS = ("intermediate_size", "ffn_dim", "d_ff", "dff", "ffn_hidden_size")  # as families call the width of their MLPs


@dataclass(frozen=True)
class Variant:
    """A model to train; `lead` are token ids that stand in front of every sequence and belong to no text."""

    name: str
    live: Live
    lead: tuple[int, ...] = ()

    @property
    def model(self) -> PreTrainedModel:
        return self.live.model


def base_config(settings: Pretrain, vocab_size: int) -> PreTrainedConfig:
    """The family with room for `length` tokens after a sink token or slots; no dropout, so that variants differ in
    nothing but what they are.

    SourceError where there is no such family, where it does not take these settings, or where slots would have no place
    in it. Nothing as large as a weight is made.
    """
    size = settings.model
    if size.family not in CONFIG_MAPPING:
        raise SourceError(
            f"pretrain.model.family: transformers has no {size.family!r}; write one such as gpt2 or llama."
        )
    kind: Any = CONFIG_MAPPING[size.family]
    try:
        known = {**kind().to_dict(), **dict.fromkeys(kind.attribute_map.values())}.keys() - RESERVED
        own = {kind.attribute_map.get(key, key): value for key, value in size.config.items()}
        if unknown := sorted(key for key in own if key not in known or key.endswith(DROPOUTS)):
            raise SourceError(
                f"pretrain.model.config: {unknown[0]!r} is {_why_not(unknown[0])} a {size.family}; leave it out"
            )
        wanted = {
            "hidden_size": size.width, "num_hidden_layers": size.blocks, "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads, "head_dim": size.width // size.heads,
            "max_position_embeddings": settings.length + max(settings.slots, 1),
            **dict.fromkeys(MLPS, 4 * size.width),
            **{key: 0.0 for key in known if key.endswith(DROPOUTS)},
        }  # fmt: skip
        renamed = {kind.attribute_map.get(key, key): value for key, value in wanted.items()}
        given = {key: value for key, value in renamed.items() if key in known}
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        parsed = parse_config({**given, **own, **ids, "vocab_size": vocab_size, "model_type": size.family})
        _require_size(parsed, settings, vocab_size)
        examine(parsed.to_dict())
    except Exception as error:  # of any class: config classes trust what they are given
        said = str(error) if isinstance(error, SurgeryError) else brief(error)
        said = said.removeprefix("config.json: ").removeprefix(f"{size.family}: ").rstrip(".")
        where = "" if said.startswith("pretrain.") else f"pretrain.model: {size.family}: "
        raise SourceError(f"{where}{said}.") from error
    return parsed


def _why_not(key: str) -> str:
    if key in RESERVED or key.endswith(DROPOUTS):
        return "not for a recipe to say of"
    return "not in the config that transformers makes of"


def _require_size(config: PreTrainedConfig, settings: Pretrain, vocab_size: int) -> None:
    """SourceError where the family has made another size of what it was given, perhaps a thousand times as large."""
    size, text = settings.model, config.get_text_config()
    if text is not config:
        raise SourceError(f"it is a multimodal model; name the language model inside, {text.model_type}")
    room, needed = getattr(config, "max_position_embeddings", None), settings.length + max(settings.slots, 1)
    if isinstance(room, int) and room < needed:
        raise SourceError(f"its max_position_embeddings is {room}, and texts with what leads them take {needed}")
    if size.heads % (groups := getattr(config, "num_key_value_heads", None) or size.heads):
        raise SourceError(f"its {groups} key/value heads do not divide {size.heads} heads")
    asked = {
        "hidden_size": size.width, "num_hidden_layers": size.blocks, "num_attention_heads": size.heads,
        "vocab_size": vocab_size,
    }  # fmt: skip
    for key, value in asked.items():
        if getattr(config, key, value) != value:
            raise SourceError(f"its {key} is {getattr(config, key)} and not {value}, so its size cannot be chosen here")


def initial_weights(config: PreTrainedConfig, seed: int) -> dict[str, torch.Tensor]:
    """Of the plain model, as transformers initialises it from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _plain(config).state_dict()


def _plain(config: PreTrainedConfig) -> PreTrainedModel:
    kind: Any = causal_class(type(config))
    model: PreTrainedModel = kind._from_config(copy.deepcopy(config), dtype=torch.float32)
    return model


def build(
    name: str, config: PreTrainedConfig, weights: dict[str, torch.Tensor], *, slots: int = 1, seed: int = 0
) -> Variant:  # fmt: skip
    """The variant `name`, untrained; `slots` are those of attention_bias at each site, drawn from `seed`."""
    config, anatomy = copy.deepcopy(config), examine(config.to_dict())
    if name in ("plain", "sink_token"):
        lead = (SINK_ID,) if name == "sink_token" else ()
        config.bos_token_id = SINK_ID if lead else None
        model = _plain(config)
        model.load_state_dict(weights)
        return Variant(name, Live(model, anatomy), lead)
    model = _derived(config, anatomy, slots if name == "attention_bias" else 0, name == "head_norm")
    state = model.state_dict()
    model.load_state_dict({**state, **weights})
    live, generator = Live(model, anatomy), torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if ".head_norm." in key:
            torch.nn.init.ones_(parameter)
        elif key not in weights:
            torch.nn.init.normal_(parameter, std=getattr(config, "initializer_range", 0.02), generator=generator)
    return Variant(name, live)


def _derived(config: PreTrainedConfig, anatomy: Anatomy, slots: int, normed: bool) -> PreTrainedModel:
    """The class of a converted checkpoint, so that it is saved and loads as one."""
    parts = frozenset({NORMS if normed else SLOTS})
    derived, module = derive(config.model_type, parts), load_derived(config.model_type, parts)
    # No prefix was folded: the slots hold what training makes of them.
    entries = {"eab": {**eab_config(anatomy, (), "as_prefix"), **anatomy.eab(slots, "as_prefix")}}
    if normed:
        entries["head_norm"] = head_norm_config(anatomy, range(len(anatomy.blocks)), per_head=False, gated=False)
    settings = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    return getattr(module, derived.name_of(anatomy.model_class))(
        getattr(module, derived.config_class)(**settings, **entries)
    )
