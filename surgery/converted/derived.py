"""The derived model type of a converted checkpoint: `eab_llama` from `llama`, and so on for every family.

The class is a few lines of generated Python that mix `AttentionBiasMixin` into the class of transformers. A checkpoint
with head norms is of another type, `eab_norm_llama`, with `HeadNormMixin` in its place, so that nothing which knows
slots alone takes it for one of its own (see `parts`). The same text is written into checkpoints (loaded with
trust_remote_code) and imported here (loaded after `import surgery`, without).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from .. import runtime
from ..checkpoint.manifest import TYPE_PREFIX
from ..endings.temporary import lasting_temporary, temporary_errors
from ..runtime.eab_families import ADAPTERS
from .parts import NORMS, PARTS, SLOTS, Part, added, class_prefix, converted_type

RUNTIME_FILES = ("eab_kernel.py", "eab_masks.py", "eab_positions.py", "eab_runtime.py")
ADAPTER_FILE = "eab_families.py"  # carried only by families that need an adapter
NORM_FILE = f"{PARTS[NORMS].file}.py"  # carried only where heads are normed
ONLY_SLOTS = frozenset({SLOTS})


@dataclass(frozen=True)
class Derived:
    """Names of the type derived from `base` by adding `parts`, and the text of the file that defines it."""

    base: str
    parts: frozenset[str]
    model_type: str
    module: str
    config_class: str
    causal_class: str
    base_class: str | None
    source: str

    @property
    def native_class(self) -> str:
        """The name of the class of transformers that the causal LM derives from."""
        return self.causal_class.removeprefix(class_prefix(self.parts))

    @property
    def auto_map(self) -> dict[str, str]:
        """config.json's `auto_map`: which class of which file the Auto classes load."""
        auto = {
            "AutoConfig": f"{self.module}.{self.config_class}",
            "AutoModelForCausalLM": f"{self.module}.{self.causal_class}",
        }
        if self.base_class is not None:
            auto["AutoModel"] = f"{self.module}.{self.base_class}"
        return auto

    def files(self) -> dict[str, str]:
        """File name -> text of every Python file that a checkpoint of this type carries."""
        folder = Path(runtime.__file__).parent
        names = [*RUNTIME_FILES]
        names += [ADAPTER_FILE] if self.base in ADAPTERS else []
        names += [f"{part.file}.py" for part in added(self.parts).values()]
        carried = {name: (folder / name).read_text(encoding="utf-8") for name in dict.fromkeys(names)}
        return {**carried, f"{self.module}.py": self.source}


def derive(base: str, parts: frozenset[str] = ONLY_SLOTS) -> Derived:
    """The type derived from a transformers model type that has a causal language model (KeyError otherwise)."""
    return _derive(base, parts | ONLY_SLOTS)


@functools.cache
def _derive(base: str, parts: frozenset[str]) -> Derived:
    config = CONFIG_MAPPING[base]
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    causal = causal[0] if isinstance(causal, tuple) else causal
    trunk: Any = MODEL_MAPPING.get(config, None)
    trunk = trunk if isinstance(trunk, type) and trunk is not causal else None
    model_type, kind = converted_type(base, parts), class_prefix(parts)
    # Some model types (openai-gpt) are no names of Python modules.
    module = f"modeling_{model_type.replace('-', '_')}"
    return Derived(
        base, parts, model_type, module,
        f"{kind}{config.__name__}", f"{kind}{causal.__name__}", trunk and f"{kind}{trunk.__name__}",
        _source(base, model_type, kind, tuple(added(parts).values()), config, causal, trunk),
    )  # fmt: skip


def _source(
    base: str, model_type: str, kind: str, parts: tuple[Part, ...], config: type, causal: type, trunk: type | None
) -> str:
    models = [model for model in (trunk, causal) if model is not None]
    imports: dict[str, set[str]] = {}
    for model in (config, *models):
        imports.setdefault(model.__module__, set()).add(model.__name__)
    carried = {"eab_families": {"ADAPTERS"}} if base in ADAPTERS else {}
    for part in parts:
        carried.setdefault(part.file, set()).add(part.mixin)
    carried.setdefault("eab_runtime", set()).add("inherit_conversions")
    mixins = ", ".join(part.mixin for part in parts)
    summary = " and ".join(part.summary for part in parts)
    lines = [
        f'"""{causal.__name__} with {summary}. Written by surgery."""',
        "",
        *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())),
        "",
        *(f"from .{file} import {', '.join(sorted(names))}" for file, names in sorted(carried.items())),
        "",
        "",
        f"class {kind}{config.__name__}({config.__name__}):",
        f'    model_type = "{model_type}"',
    ]
    for model in models:
        lines += [
            "",
            "",
            f"class {kind}{model.__name__}({mixins}, {model.__name__}):",
            f"    config_class = {kind}{config.__name__}",
            *([f'    adapter = ADAPTERS["{base}"]'] if base in ADAPTERS else []),
        ]
    lines += ["", ""]
    for model in models:
        auto = "AutoModelForCausalLM" if model is causal else "AutoModel"
        lines += [
            f'inherit_conversions({kind}{model.__name__}, {model.__name__}, "{model_type}", "{base}")',
            f'{kind}{model.__name__}.register_for_auto_class("{auto}")',
        ]
    return "\n".join([*lines, f"{kind}{config.__name__}.register_for_auto_class()", ""])


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
