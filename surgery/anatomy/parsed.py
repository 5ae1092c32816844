"""config.json as transformers reads it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import SourceError, UnsupportedModel, brief
from ..words import named
from .classes import causal_class, has_text_tower, reads_of
from .patching import PIXELS, SOUND


def read_as_config(config: dict) -> PreTrainedConfig:
    """The transformers config object of a raw config.json, of whatever kind of model."""
    model_type: Any = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"config.json: model_type '{named(model_type)}' is not an architecture of the installed transformers; "
            "upgrade transformers, or check the spelling"
        )
    kind: Any = CONFIG_MAPPING[model_type]
    for part in (config, *(config[name] for name in kind.sub_configs if isinstance(config.get(name), dict))):
        if hidden := next((key for key in part if inspect.isroutine(getattr(PreTrainedConfig, key, None))), None):
            raise SourceError(f"config.json: '{named(hidden)}' hides a method of {kind.__name__}; remove that key.")
    try:
        # What it is given it completes in place, the dicts inside as well.
        parsed = kind.from_dict(kind._decode_special_floats(copy.deepcopy(config)))
    except Exception as error:  # each config class validates in its own way, with its own errors
        raise SourceError(f"config.json: transformers does not accept it as {model_type!r} ({brief(error)})") from error
    return parsed


def parse_config(config: dict) -> PreTrainedConfig:
    """The same of a causal language model; UnsupportedModel where there is none."""
    parsed = read_as_config(config)
    model_type = config["model_type"]
    if causal_class(type(parsed)) is None:
        reads = reads_of(type(parsed))
        encoder = "sound, give --audio" if reads in SOUND else "images, give --images"
        is_one = reads == PIXELS or reads in SOUND or hasattr(parsed, "vision_config")
        raise UnsupportedModel(
            f"config.json: model_type {model_type!r} has no causal language model, so nothing predicts tokens"
            f"{f'; to survey an encoder of {encoder} to scan, or run encoder-slots' if is_one else ''}"
            f"{', or clip-text for its text' if has_text_tower(config) else ''}"
        )
    return parsed
