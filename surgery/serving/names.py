"""What the plugin and the export for vLLM both have to know. The standard library only.

A directory for vLLM has the config of the base model, with two differences: `architectures` names a class that only the
plugin knows, so that vLLM without it stops, and the entry `served_slots` says how requests begin.
"""

from __future__ import annotations

import re

PREFIX = "SurgeryEab"  # SurgeryEabLlamaForCausalLM: vLLM's LlamaForCausalLM, with slots
ENTRY = "served_slots"
FORMAT = 1
VLLM = "0.32"  # whose insides the plugin knows
PLUGIN = "surgery_eab"  # the entry point's name, as VLLM_PLUGINS takes it

_SLOT = re.compile(r"(.+)\.attention_bias\.(key|value)")


def slot_of(name: str) -> tuple[int, str] | None:
    """(layer, "key" or "value") of a tensor of slots, by its name in a checkpoint; None for any other tensor.

    `model.layers.3.self_attn.attention_bias.key` is (3, "key"). ValueError where the name tells no layer.
    """
    match = _SLOT.fullmatch(name)
    return None if match is None else (layer_of(match[1]), match[2])


def layer_of(site: str) -> int:
    """The layer of an attention site, by its name: the only number in it. ValueError with none or several."""
    numbers = [int(part) for part in site.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ValueError(f"{site} does not tell its layer: a site with slots has one number in its name")
    return numbers[0]
