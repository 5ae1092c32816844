"""The unmodified original in memory, made of a converted model that holds all its weights."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import init_empty_weights
from transformers import PreTrainedModel

from ..anatomy.classes import causal_class
from ..anatomy.quiet import quiet
from ..anatomy.sites import Anatomy
from ..live.loading import require_in_memory


def original_within(model: PreTrainedModel, anatomy: Anatomy) -> PreTrainedModel:
    """The model that `model` was converted from, if only slots were added: it shares its weights and buffers.

    SourceError where some of them are not in memory.
    """
    require_in_memory(model, "the proof of an export")
    config = copy.deepcopy(anatomy.config)
    config._attn_implementation = None
    with quiet(), init_empty_weights(include_buffers=False):
        kind: Any = causal_class(type(config))
        original: Any = kind._from_config(config, dtype=model.dtype)
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):  # rounds its inputs, which plain layers of the same weights do not
            original.set_submodule(name, module)
    held = {name: tensor for name, tensor in model.state_dict().items() if ".attention_bias." not in name}
    original.load_state_dict(held, assign=True, strict=False)
    original.tie_weights()
    if left := [name for name, parameter in original.named_parameters() if parameter.is_meta]:
        raise RuntimeError(f"{left[0]} of {type(original).__name__} is not in the converted model")
    return original.to(model.device).eval()
