"""Make the derived model types known to transformers' Auto classes, without importing what nobody asks for.

`import surgery` calls `register` once transformers' Auto classes are there (now, or when somebody imports them). Each
derived type is built the first time its model type is looked up.
"""

from __future__ import annotations

from .parts import Converted, converted_from


class _LazyTypes(dict):
    """Stands in for the dict in which transformers keeps registered types; knows every `eab_` type on demand."""

    def _known(self, key) -> Converted | None:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

        found = converted_from(key)
        base = found and found.base
        known = base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or base in MODEL_MAPPING_NAMES
        return found if known and base in CONFIG_MAPPING._mapping else None

    def __contains__(self, key) -> bool:
        return super().__contains__(key) or self._known(key) is not None

    def __missing__(self, key):
        found = self._known(key)
        if found is None:
            raise KeyError(key)
        return _register_type(found)


def _register_type(converted: Converted) -> type:
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    # Only now: `register` runs while transformers is half imported.
    from .derived import derive, load_derived

    derived, module = derive(*converted), load_derived(*converted)
    config = getattr(module, derived.config_class)
    AutoConfig.register(derived.model_type, config, exist_ok=True)
    for auto, name in derived.classes.items():
        getattr(modeling_auto, auto).register(config, getattr(module, name), exist_ok=True)
    return config


def register() -> None:
    """Teach the Auto classes the derived types, each those that it knows the base of. Safe to call twice."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(CONFIG_MAPPING._extra_content, _LazyTypes):
        CONFIG_MAPPING._extra_content = _LazyTypes(CONFIG_MAPPING._extra_content)
