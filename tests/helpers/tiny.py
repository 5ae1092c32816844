"""Tiny models of many families, made from configs, with weights that make every part of attention matter.

`TINY` holds the settings by model type: 4 layers, 4 heads, vocabulary 97; windows of 8 and chunks of 16 tokens, so that
a text of 40 tokens runs past them. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from surgery.anatomy.sites import examine
from surgery.live.model import Live

VOCAB = 97
FIRST_TEXT_ID = 3  # 0 pads, 1 begins, 2 ends

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_UNGROUPED = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"}
_MIXED = ["sliding_attention", "full_attention"] * 2

TINY: dict[str, dict] = {
    "llama": _BASE,
    "mistral": {**_BASE, "sliding_window": 8},
    "qwen2": _BASE,
    "gpt2": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt": {
        "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 256, "word_embed_proj_dim": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": _UNGROUPED,
    "mixtral": {**_BASE, "num_local_experts": 4},
    "gpt_oss": {**_BASE, "head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "layer_types": _MIXED},
    "gemma2": {
        **_BASE, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
        "layer_types": _MIXED,
    },
    "gemma3_text": {
        **_BASE, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": _MIXED,
    },
    "llama4_text": {
        **_BASE, "head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 4,
        "floor_scale": 4, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0],
    },
    "phi": _BASE,
    "stablelm": _BASE,
    "olmo2": _BASE,
    "cohere": _BASE,
    "granite": _BASE,
}  # fmt: skip


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """The config of `TINY[model_type]`, with `changes`."""
    return CONFIG_MAPPING[model_type](**{**TINY[model_type], **changes})


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A causal language model in float64, in evaluation mode, with random weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):  # what is no matrix may begin at random
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float64)
        if type(model.config) is not type(config):  # only the text model inside
            model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float64)
    model = model.eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped_mm knows no float64
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            # Norms and biases stay near what they are; matrices are large enough for attention to be far from uniform.
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else 0.25 * noise)
    return model


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` with its floating-point tensors in `dtype`: rotary tables of vision towers are complex, and stay."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float64, seed: int = 0, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """`build` of the tiny config of a family, or of `config`, in `dtype`."""
    return build(tiny_config(model_type) if config is None else config, seed).to(dtype)


def tiny_text(rows: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length) without special tokens."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TEXT_ID, VOCAB, (rows, length), generator=source)


def live_of(model: PreTrainedModel) -> Live:
    """A model in memory with its anatomy."""
    return Live(model, examine(model.config.to_dict()))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Operations of this size spend most of their time on handing work to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
