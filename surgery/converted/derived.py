"""The derived model type of a converted checkpoint: `eab_llama` from `llama`, and so on for every family.

The class is a few lines of generated Python that mix `AttentionBiasMixin` into the class of transformers. A checkpoint
with head norms is of another type, `eab_norm_llama`, with `HeadNormMixin` in its place, so that nothing which knows
slots alone takes it for one of its own. The same text is written into checkpoints (loaded with trust_remote_code) and
imported here (loaded after `import surgery`, without).
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from .. import runtime
from ..checkpoint.manifest import NORM_PREFIX, TYPE_PREFIX
from ..runtime.eab_families import ADAPTERS

RUNTIME_FILES = ("eab_kernel.py", "eab_masks.py", "eab_positions.py", "eab_runtime.py")
ADAPTER_FILE = "eab_families.py"  # carried only by families that need an adapter
NORM_FILE = "eab_head_norm.py"  # carried only where heads are normed


@dataclass(frozen=True)
class Derived:
    """Names of the derived type, and the text of the file that defines it."""

    base_type: str
    head_norm: bool
    model_type: str
    module: str
    config_class: str
    causal_class: str
    base_class: str | None
    source: str

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
        names += [ADAPTER_FILE] if self.base_type in ADAPTERS else []
        names += [NORM_FILE] if self.head_norm else []
        carried = {name: (folder / name).read_text(encoding="utf-8") for name in names}
        return {**carried, f"{self.module}.py": self.source}


def derive(base_type: str, head_norm: bool = False) -> Derived:
    """The derived type of a transformers model type that has a causal language model (KeyError otherwise)."""
    return _derive(base_type, head_norm)


@functools.cache
def _derive(base_type: str, head_norm: bool) -> Derived:
    config = CONFIG_MAPPING[base_type]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    causal = causal[0] if isinstance(causal, tuple) else causal
    base = MODEL_MAPPING.get(config, None)
    base = base if isinstance(base, type) and base is not causal else None
    prefix, kind = (NORM_PREFIX, "EabNorm") if head_norm else (TYPE_PREFIX, "Eab")
    # Some model types (openai-gpt) are no names of Python modules.
    model_type, module = prefix + base_type, f"modeling_{prefix}{base_type.replace('-', '_')}"
    return Derived(
        base_type, head_norm, model_type, module,
        f"{kind}{config.__name__}", f"{kind}{causal.__name__}", base and f"{kind}{base.__name__}",
        _source(base_type, model_type, kind, config, causal, base),
    )  # fmt: skip


def _source(base_type: str, model_type: str, kind: str, config: type, causal: type, base: type | None) -> str:
    normed = kind == "EabNorm"
    mixin = "HeadNormMixin" if normed else "AttentionBiasMixin"
    what = (
        "head norms in its attention sites" if normed else "an explicit attention bias: slots in every attention site"
    )
    models = [model for model in (base, causal) if model is not None]
    imports: dict[str, set[str]] = {}
    for model in (config, *models):
        imports.setdefault(model.__module__, set()).add(model.__name__)
    lines = [
        f'"""{causal.__name__} with {what}. Written by surgery."""',
        "",
        *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())),
        "",
        *(["from .eab_families import ADAPTERS"] if base_type in ADAPTERS else []),
        *(["from .eab_head_norm import HeadNormMixin"] if normed else []),
        f"from .eab_runtime import {'' if normed else 'AttentionBiasMixin, '}inherit_conversions",
        "",
        "",
        f"class {kind}{config.__name__}({config.__name__}):",
        f'    model_type = "{model_type}"',
    ]
    for model in models:
        lines += [
            "",
            "",
            f"class {kind}{model.__name__}({mixin}, {model.__name__}):",
            f"    config_class = {kind}{config.__name__}",
            *([f'    adapter = ADAPTERS["{base_type}"]'] if base_type in ADAPTERS else []),
        ]
    lines += ["", ""]
    for model in models:
        auto = "AutoModelForCausalLM" if model is causal else "AutoModel"
        lines += [
            f'inherit_conversions({kind}{model.__name__}, {model.__name__}, "{model_type}", "{base_type}")',
            f'{kind}{model.__name__}.register_for_auto_class("{auto}")',
        ]
    return "\n".join([*lines, f"{kind}{config.__name__}.register_for_auto_class()", ""])


def load_derived(base_type: str, head_norm: bool = False) -> ModuleType:
    """Import the derived type's module in this process, from real files, so that `save_pretrained` can copy them."""
    return _load_derived(base_type, head_norm)


@functools.cache
def _load_derived(base_type: str, head_norm: bool) -> ModuleType:
    derived = derive(base_type, head_norm)
    folder = Path(tempfile.mkdtemp(prefix=f"surgery-{derived.model_type}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = f"surgery_derived_{derived.model_type.removeprefix(TYPE_PREFIX)}"
    (folder / "__init__.py").write_text("", encoding="utf-8")
    for name, text in derived.files().items():
        (folder / name).write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{derived.module}")
