"""The matrix: every causal language model type of transformers, what becomes of it, and a tiny config to show it on.

The table itself is data, `families.yaml`. Each entry names a model type and says

* `outcome`: `exact` (the folded model is the original behind the prefix), `refused` (surgery says why it will not), or
  `not a fit` (no causal softmax attention over its own tokens to fold into: state space, retrieval, encoders ...);
* `why`, for those that are not exact: a part of the sentence that surgery refuses them with;
* `positions` and `attention`, for those that are: what the README's table says about them;
* `settings`: what its tiny config needs beyond `SMALL`, nested as in the config;
* `runs_in`: the default dtype that its own code needs to run in float64 at all.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from ruamel.yaml import YAML
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from helpers.tiny import TINY, build, tiny_model

TABLE = Path(__file__).with_name("families.yaml")
PREFIX = [1, 5, 7]  # the BOS among them
OUTCOMES = ("exact", "refused", "not a fit")

# What makes a config small, under the names that config classes use; each is set only where the class knows the name.
SMALL = {
    "vocab_size": 97,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], 4),
    "encoder_layers": 2,
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"], 4),
    "encoder_attention_heads": 4,
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 256),
    "head_dim": 8,
    "sliding_window": 8,
    "attention_chunk_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
}  # fmt: skip


STATES = {"gated delta net", "delta attention", "Mamba", "Mamba-2", "Mamba-2 beside attention"}


@dataclass(frozen=True)
class Family:
    """One row of the matrix."""

    model_type: str
    outcome: str
    why: str | None = None
    positions: str | None = None
    attention: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    runs_in: str | None = None

    @property
    def rounds(self) -> bool:
        """Whether kernels of a state compute in float32, whatever they are given."""
        return bool(STATES & set(self.attention))

    def config(self, **changes) -> PreTrainedConfig:
        """A config of this type with 4 layers, 4 heads and 97 tokens, windows of 8 and chunks of 16 tokens."""
        return tiny(self.model_type, {**self.settings, **changes})

    @contextlib.contextmanager
    def default_dtype(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.runs_in or "float32"))
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def behind(text: torch.Tensor) -> torch.Tensor:
    """The rows of `text` (rows, T) behind `PREFIX`."""
    return torch.cat([torch.tensor([PREFIX]).expand(len(text), -1), text], dim=1)


def tiny(model_type: str, settings: dict) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    return kind(**_merged(_small(kind), settings))


def _small(kind: type[PreTrainedConfig]) -> dict:
    """The part of `SMALL` that a config class knows, and the same for the text model inside a wrapper."""
    try:
        known = kind().to_dict()
    except StrictDataclassError:  # a default that its own class refuses: gemma4_assistant
        known = kind.__dataclass_fields__
    chosen = {name: value for name, value in SMALL.items() if name in known or name in kind.attribute_map}
    if isinstance(text := kind.sub_configs.get("text_config"), type) and issubclass(text, PreTrainedConfig):
        chosen["text_config"] = _small(text)
    return chosen


def _merged(base: dict, settings: dict) -> dict:
    """`settings` over `base`, dicts within dicts; `~` (None) drops a name that SMALL set."""
    merged = copy.deepcopy(base)
    for name, value in settings.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value)
        else:
            merged[name] = copy.deepcopy(value)
    return merged


@cache
def families() -> dict[str, Family]:
    """Model type -> its row, in the order of the file."""
    rows = YAML(typ="safe").load(TABLE.read_text(encoding="utf-8"))["families"]
    return {kind: Family(kind, **{**row, "attention": tuple(row.get("attention", ()))}) for kind, row in rows.items()}


EXACT = [kind for kind, family in families().items() if family.outcome == "exact"]
OTHERS = [kind for kind, family in families().items() if family.outcome != "exact"]

# The quick tier's: between them every way to give positions, to mask, to share heads and to reach the seam, and of the
# others one for each reason.
DOZEN = (
    "llama", "gpt2", "opt", "bloom", "falcon", "mistral", "mixtral", "gemma2", "gemma3_text", "gpt_oss", "llama4_text",
    "deepseek_v3",
)  # fmt: skip
QUICK = {*DOZEN, *{families()[kind].why: kind for kind in reversed(OTHERS)}.values()}


def in_tiers(kinds: Iterable[str]) -> list:
    """`kinds` for `pytest.mark.parametrize`: those beyond the quick tier's are marked `matrix`."""
    return [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.matrix) for kind in kinds]


def any_model(model_type: str) -> PreTrainedModel:
    """A tiny model of any type in float64: of its settings in `TINY`, else of its row."""
    if model_type in TINY:
        return tiny_model(model_type)
    family = families()[model_type]
    with family.default_dtype():
        return build(family.config())
