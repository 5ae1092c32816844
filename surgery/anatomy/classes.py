"""Which class of transformers holds all that a checkpoint stores, and predicts tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from .patching import PIXELS, SOUND

# Of these some build only the text model inside a multimodal one; then comes the other, which builds all of it.
ANY = "AutoModel"
CAUSAL, MULTIMODAL = "AutoModelForCausalLM", "AutoModelForMultimodalLM"


def causal_class(config: type) -> type | None:
    """The class for a type of config; None where there is no causal language model of it."""
    found = of_auto(CAUSAL, config)
    if found is None or config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return found if holds_all(found, config) else of_auto(MULTIMODAL, config) or found


def holds_all(model: Any, config: Any) -> bool:
    """Whether a class holds all that a checkpoint of this type of config has, and not only a model inside."""
    inside = [kind for kind in config.sub_configs.values() if isinstance(kind, type)]
    return model.config_class is config or model.config_class not in inside


def models_of(config: type) -> dict[str, type]:
    """Auto class -> the class that it loads for a config, of the module of the one that holds all: the trunk first.

    That is the causal language model, or where there is none, what AutoModel loads. Some heads belong to another model
    that reads this one's config. KeyError where there is neither.
    """
    causal = causal_class(config)
    whole = of_auto(ANY, config) if causal is None else causal
    if whole is None:
        raise KeyError(config)
    models = {ANY: of_auto(ANY, config), **({} if causal is None else {CAUSAL: causal})}
    if models[ANY] is causal:
        del models[ANY]
    autos = (name for name in vars(modeling_auto) if name.startswith("AutoModelFor"))
    models.update({name: of_auto(name, config) for name in sorted(autos) if name != CAUSAL})
    return {
        name: model
        for name, model in models.items()
        if model is not None and model.__module__ == whole.__module__ and holds_all(model, config)
    }


def auto_of(kind: type, config: type) -> str:
    """The Auto class that loads a class of transformers for a type of config."""
    return next((auto for auto, model in models_of(config).items() if model is kind), ANY)


def reads_of(config: type) -> str | None:
    """What the model is called with that AutoModel loads for a config; None where it loads none, or lacks a package."""
    try:
        name: str | None = getattr(of_auto(ANY, config), "main_input_name", None)
    except (ImportError, ValueError):  # of a placeholder, whatever it is asked for; or where there is no such class
        return None
    return name


def is_text(config: Mapping[str, Any]) -> bool:
    """Whether a raw config.json is of a causal language model: there is one of its type, no encoder of sound beside it,
    as in Whisper, and it is no BERT or its like, which see all of a text unless they are made decoders."""
    kind = _type_of(config)
    if kind is None or causal_class(kind) is None or reads_of(kind) in SOUND:
        return False

    def says(key: str) -> bool:
        return bool(config.get(key, getattr(kind, key, False)))

    return kind not in MODEL_FOR_MASKED_LM_MAPPING or says("is_encoder_decoder") or says("is_decoder")


def sees_or_hears(config: Mapping[str, Any]) -> bool:
    """Whether a model of a raw config.json is, or has inside, an encoder of images or sound."""
    kind = _type_of(config)
    reads = None if kind is None else reads_of(kind)
    return reads == PIXELS or reads in SOUND or not _parts(config).isdisjoint(("vision_config", "audio_config"))


def has_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a raw config.json may be of an encoder: of a type that AutoModel loads, and none that writes as well."""
    kind = _type_of(config)
    writes = config.get("is_encoder_decoder", getattr(kind, "is_encoder_decoder", False))
    return kind is not None and of_auto(ANY, kind) is not None and (sees_or_hears(config) or not writes)


def has_text_tower(config: Mapping[str, Any]) -> bool:
    """Whether such a model has a part of its own for text, as CLIP has."""
    return "text_config" in _parts(config)


def _parts(config: Mapping[str, Any]) -> set[str]:
    kind = _type_of(config)
    return {*config, *(() if kind is None else kind.sub_configs)}


def _type_of(config: Mapping[str, Any]) -> Any:
    """The config class of a raw config.json; None of a model type that transformers does not know."""
    model_type: Any = config.get("model_type")
    return CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None


def of_auto(auto: str, config: type) -> Any:
    """What an Auto class loads for a type of config: where it chooses by architecture, its first choice."""
    found: Any = getattr(modeling_auto, auto)._model_mapping.get(config, None)
    return found[0] if isinstance(found, (tuple, list)) else found
