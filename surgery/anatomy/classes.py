"""Which class of transformers holds all that a checkpoint stores, and predicts tokens."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

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


def of_auto(auto: str, config: type) -> Any:
    """What an Auto class loads for a type of config: where it chooses by architecture, its first choice."""
    found: Any = getattr(modeling_auto, auto)._model_mapping.get(config, None)
    return found[0] if isinstance(found, (tuple, list)) else found
