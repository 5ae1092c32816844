"""Which class of transformers holds all that a checkpoint stores, and predicts tokens."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .patching import SOUND

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


def is_text(config: type) -> bool:
    """Whether there is a causal language model of a config, and no encoder of sound beside it, as in Whisper."""
    return causal_class(config) is not None and reads_of(config) not in SOUND


def of_auto(auto: str, config: type) -> Any:
    """What an Auto class loads for a type of config: where it chooses by architecture, its first choice."""
    found: Any = getattr(modeling_auto, auto)._model_mapping.get(config, None)
    return found[0] if isinstance(found, (tuple, list)) else found
