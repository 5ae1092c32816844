"""Rotary settings in config.json, in the spelling of transformers 5 (`rope_parameters`) and in the one before it.

Other engines (mlx-lm, older vLLM) know only `rope_theta` and `rope_scaling`. Where both are missing they compute with a
base of 10,000 and say nothing.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NEW, THETA, SCALING, PARTIAL = "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"


def with_both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """`config` (a raw config.json), with the older spelling beside the newer where that says the same.

    A spelling that is there stays. One that transformers reads as another configuration is not added.
    """
    both = _spelled(config)
    if isinstance(text := config.get("text_config"), dict):
        both["text_config"] = _spelled(text)
    return both if both != config and _parsed(both) == _parsed(config) else config


def spelled_for_conversion(config: dict[str, Any]) -> dict[str, Any]:
    """`config` in both spellings, or in the newer alone where the older would stop who loads the tokenizer.

    The type of a converted checkpoint is none of transformers': without the checkpoint's code it is read as a bare
    config, and that stops on the older spelling of some kinds (Llama 3's, YaRN).
    """
    both = with_both_spellings(config)
    return both if _read_bare(both) else _newer_alone(config)


def _newer_alone(config: dict[str, Any]) -> dict[str, Any]:
    parsed = _parsed(config)
    if not isinstance(parsed, dict) or not parsed.get(NEW):
        return config
    alone = {key: value for key, value in config.items() if key not in (THETA, SCALING, PARTIAL)} | {NEW: parsed[NEW]}
    return alone if _parsed(alone) == parsed else config


def _read_bare(config: dict[str, Any]) -> bool:
    """Whether a bare config reads it: one with a base and a kind beside each other may ask for more."""
    if not (config.get(THETA) and config.get(SCALING)):
        return True
    rotary = {key: config[key] for key in (NEW, THETA, SCALING, PARTIAL) if key in config}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this spelling is old
            PreTrainedConfig.from_dict(copy.deepcopy(rotary))
    except AttributeError:
        return False
    return True


def _spelled(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get(NEW)
    # Settings that differ by layer are mappings inside it; each family spelled those in its own way.
    if not isinstance(rope, dict) or THETA not in rope or config.keys() & {THETA, SCALING, PARTIAL}:
        return {**config}
    scaling = {key: value for key, value in rope.items() if key not in (THETA, PARTIAL)}
    old = {name: rope[name] for name in (THETA, PARTIAL) if name in rope}
    if rope.get("rope_type", "default") != "default":
        old[SCALING] = scaling
    return {**config, **old}


def _parsed(config: dict[str, Any]) -> dict[str, Any] | Exception:
    """What transformers makes of it; an error is like nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parsed: dict[str, Any] = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).to_dict()
            return parsed
    except Exception as error:  # of any class, as transformers trusts what is in a config
        return error
