"""The derived model type of a converted checkpoint: `eab_llama` from `llama`, and so on for every family.

The classes are a few lines of generated Python that mix `AttentionBiasMixin` into those of transformers: the trunk, the
causal language model if there is one, and every other head that an Auto class loads for the base, such as classifiers.
A checkpoint with head norms is of another type, `eab_norm_llama`, with `HeadNormMixin` in its place, so that nothing
which knows slots alone takes it for one of its own (see `parts`). The same text is written into checkpoints (loaded
with trust_remote_code) and imported here (loaded after `import surgery`, without).
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .. import runtime
from ..anatomy.classes import ANY, CAUSAL, models_of
from ..checkpoint.manifest import TYPE_PREFIX
from ..endings.temporary import lasting_temporary, temporary_errors
from ..runtime.eab_families import ADAPTERS
from .parts import NORMS, PARTS, SLOTS, Part, added, class_prefix, converted_type

RUNTIME_FILES = (
    "eab_added.py", "eab_flex.py", "eab_indexer.py", "eab_kernel.py", "eab_masks.py", "eab_mixers.py",
    "eab_positions.py", "eab_runtime.py",
)  # fmt: skip
ADAPTER_FILE = "eab_families.py"  # carried only by families that need an adapter
NORM_FILE = f"{PARTS[NORMS].file}.py"  # carried only where heads are normed
ONLY_SLOTS = frozenset({SLOTS})


@dataclass(frozen=True)
class Derived:
    """Names of the type derived from `base` by adding `parts`, and the text of the file that defines it.

    `classes`: name of each Auto class that knows the base -> name of the derived class that it loads.
    """

    base: str
    parts: frozenset[str]
    model_type: str
    module: str
    config_class: str
    classes: Mapping[str, str]
    source: str

    def name_of(self, native: type) -> str:
        """The name of the class that derives from one of transformers."""
        return f"{class_prefix(self.parts)}{native.__name__}"

    @property
    def auto_map(self) -> dict[str, str]:
        """config.json's `auto_map`: which class of which file the Auto classes load."""
        named = {"AutoConfig": self.config_class, **self.classes}
        return {auto: f"{self.module}.{name}" for auto, name in named.items()}

    def files(self) -> dict[str, str]:
        """File name -> text of every Python file that a checkpoint of this type carries."""
        folder = Path(runtime.__file__).parent
        names = [*RUNTIME_FILES]
        names += [ADAPTER_FILE] if self.base in ADAPTERS else []
        names += [f"{part.file}.py" for part in added(self.parts).values()]
        carried = {name: (folder / name).read_text(encoding="utf-8") for name in dict.fromkeys(names)}
        return {**carried, f"{self.module}.py": self.source}


def derive(base: str, parts: frozenset[str] = ONLY_SLOTS) -> Derived:
    """The type derived from a transformers model type; KeyError where AutoModel loads nothing of it."""
    return _derive(base, parts | ONLY_SLOTS)


@functools.cache
def _derive(base: str, parts: frozenset[str]) -> Derived:
    config = CONFIG_MAPPING[base]
    models = models_of(config)
    model_type, kind = converted_type(base, parts), class_prefix(parts)
    # Some model types (openai-gpt) are no names of Python modules.
    module = f"modeling_{model_type.replace('-', '_')}"
    return Derived(
        base, parts, model_type, module, f"{kind}{config.__name__}",
        {auto: f"{kind}{model.__name__}" for auto, model in models.items()},
        _source(base, model_type, kind, tuple(added(parts).values()), config, models),
    )  # fmt: skip


def other_heads(config: PreTrainedConfig) -> list[str]:
    """Names of the linear layers outside of the trunk in the models but the causal one that Auto classes load."""
    models, names = models_of(type(config)), []
    for kind in set(models.values()) - {models.get(ANY), models.get(CAUSAL)}:
        with torch.device("meta"):
            model: Any = kind(copy.deepcopy(config))
        if model.base_model is model:
            continue
        inside = set(model.base_model.modules())
        linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
        names += [name for name, module in linear if module not in inside]
    return sorted(set(names))


def _source(
    base: str, model_type: str, kind: str, parts: tuple[Part, ...], config: type, models: Mapping[str, type]
) -> str:
    autos = {model: auto for auto, model in reversed(list(models.items()))}  # the first Auto class of each
    classes = list(dict.fromkeys(models.values()))
    imports: dict[str, set[str]] = {}
    for model in (config, *classes):
        imports.setdefault(model.__module__, set()).add(model.__name__)
    if ANY in models:
        imports["transformers"] = {ANY}
    carried = {"eab_families": {"ADAPTERS"}} if base in ADAPTERS else {}
    for part in parts:
        carried.setdefault(part.file, set()).add(part.mixin)
    carried.setdefault("eab_runtime", set()).add("inherit_conversions")
    mixins = ", ".join(part.mixin for part in parts)
    summary = " and ".join(part.summary for part in parts)
    lines = [
        f'"""{(models.get(CAUSAL) or models[ANY]).__name__} with {summary}. Written by surgery."""',
        "",
        *(_import(module, names) for module, names in sorted(imports.items())),
        "",
        *(_import(f".{file}", names) for file, names in sorted(carried.items())),
        "",
        "",
        f"class {kind}{config.__name__}({config.__name__}):",
        f'    model_type = "{model_type}"',
    ]
    for model in classes:
        lines += [
            "",
            "",
            f"class {kind}{model.__name__}({mixins}, {model.__name__}):",
            f"    config_class = {kind}{config.__name__}",
            *([f'    adapter = ADAPTERS["{base}"]'] if base in ADAPTERS else []),
        ]
    lines += ["", "", "for derived, native, auto in ("]
    lines += [f'    ({kind}{model.__name__}, {model.__name__}, "{autos[model]}"),' for model in classes]
    lines += [
        "):",
        f'    inherit_conversions(derived, native, "{model_type}", "{base}")',
        "    derived.register_for_auto_class(auto)",
        f"{kind}{config.__name__}.register_for_auto_class()",
    ]
    if ANY in models:
        lines += [
            "# Some heads ask AutoModel for their trunk, by its config.",
            f"AutoModel.register({kind}{config.__name__}, {kind}{models[ANY].__name__}, exist_ok=True)",
        ]
    return "\n".join([*lines, ""])


def _import(module: str, names: set[str]) -> str:
    line = f"from {module} import {', '.join(sorted(names))}"
    if len(line) <= 120:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in sorted(names)), ")"])


def load_derived(base: str, parts: frozenset[str] = ONLY_SLOTS) -> ModuleType:
    """Import the derived type's module in this process, from real files, so that `save_pretrained` can copy them."""
    return _load_derived(base, parts | ONLY_SLOTS)


@functools.cache
def _load_derived(base: str, parts: frozenset[str]) -> ModuleType:
    derived = derive(base, parts)
    folder = lasting_temporary()
    package = f"surgery_derived_{derived.model_type.removeprefix(TYPE_PREFIX)}"
    with temporary_errors():
        (folder / "__init__.py").write_text("", encoding="utf-8")
        for name, text in derived.files().items():
            (folder / name).write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{derived.module}")
