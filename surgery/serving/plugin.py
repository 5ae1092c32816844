"""The entry point that vLLM calls in each of its processes before it looks at a model (group vllm.general_plugins)."""

from __future__ import annotations

from .names import PREFIX
from .requests import guard


def register() -> None:
    """Make known, by name, a class with slots for every model of vLLM, and check requests to such models.

    Imports none of them. Safe to call twice.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.engine.input_processor import InputProcessor

    known = [name for name in ModelRegistry.get_supported_archs() if not name.startswith(PREFIX)]
    for name in known:
        ModelRegistry.register_model(PREFIX + name, f"{__package__}.models:{PREFIX}{name}")
        if name in MODELS_CONFIG_MAP:  # what vLLM settles for that architecture, it settles by name
            MODELS_CONFIG_MAP[PREFIX + name] = MODELS_CONFIG_MAP[name]
    guard(InputProcessor, VLLMValidationError)
