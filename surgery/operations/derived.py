"""The derived model type of a converted checkpoint: `eab_llama` from `llama`, and so on for every family.

The class is a few lines of generated Python that mix `AttentionBiasMixin` into the class of transformers. The same text
is written into checkpoints (loaded with trust_remote_code) and imported here (loaded after `import surgery`, without).
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
from ..checkpoint.manifest import TYPE_PREFIX
from ..runtime.eab_families import ADAPTERS

RUNTIME_FILES = ("eab_kernel.py", "eab_masks.py", "eab_positions.py", "eab_runtime.py")
ADAPTER_FILE = "eab_families.py"  # carried only by families that need an adapter


@dataclass(frozen=True)
class Derived:
    """Names of the derived type, and the text of the file that defines it."""

    base_type: str
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
        names = (*RUNTIME_FILES, ADAPTER_FILE) if self.base_type in ADAPTERS else RUNTIME_FILES
        carried = {name: (folder / name).read_text(encoding="utf-8") for name in names}
        return {**carried, f"{self.module}.py": self.source}


@functools.cache
def derive(base_type: str) -> Derived:
    """The derived type of a transformers model type that has a causal language model (KeyError otherwise)."""
    config = CONFIG_MAPPING[base_type]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    causal = causal[0] if isinstance(causal, tuple) else causal
    base = MODEL_MAPPING.get(config, None)
    base = base if isinstance(base, type) and base is not causal else None
    # Some model types (openai-gpt) are no names of Python modules.
    model_type, module = TYPE_PREFIX + base_type, f"modeling_{TYPE_PREFIX}{base_type.replace('-', '_')}"
    return Derived(
        base_type, model_type, module, f"Eab{config.__name__}", f"Eab{causal.__name__}", base and f"Eab{base.__name__}",
        _source(base_type, config, causal, base),
    )  # fmt: skip


def _source(base_type: str, config: type, causal: type, base: type | None) -> str:
    models = [model for model in (base, causal) if model is not None]
    imports: dict[str, set[str]] = {}
    for model in (config, *models):
        imports.setdefault(model.__module__, set()).add(model.__name__)
    lines = [
        f'"""{causal.__name__} with an explicit attention bias: slots in every attention site. Written by surgery."""',
        "",
        *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())),
        "",
        *(["from .eab_families import ADAPTERS"] if base_type in ADAPTERS else []),
        "from .eab_runtime import AttentionBiasMixin, inherit_conversions",
        "",
        "",
        f"class Eab{config.__name__}({config.__name__}):",
        f'    model_type = "{TYPE_PREFIX}{base_type}"',
    ]
    for model in models:
        lines += [
            "",
            "",
            f"class Eab{model.__name__}(AttentionBiasMixin, {model.__name__}):",
            f"    config_class = Eab{config.__name__}",
            *([f'    adapter = ADAPTERS["{base_type}"]'] if base_type in ADAPTERS else []),
        ]
    lines += ["", ""]
    for model in models:
        auto = "AutoModelForCausalLM" if model is causal else "AutoModel"
        lines += [
            f'inherit_conversions(Eab{model.__name__}, {model.__name__}, "{TYPE_PREFIX}{base_type}", "{base_type}")',
            f'Eab{model.__name__}.register_for_auto_class("{auto}")',
        ]
    return "\n".join([*lines, f"Eab{config.__name__}.register_for_auto_class()", ""])


@functools.cache
def load_derived(base_type: str) -> ModuleType:
    """Import the derived type's module in this process, from real files, so that `save_pretrained` can copy them."""
    derived = derive(base_type)
    folder = Path(tempfile.mkdtemp(prefix=f"surgery-{derived.model_type}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = f"surgery_derived_{base_type}"
    (folder / "__init__.py").write_text("", encoding="utf-8")
    for name, text in derived.files().items():
        (folder / name).write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{derived.module}")
