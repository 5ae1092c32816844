"""Load a converted checkpoint the way its users do, without running code from strangers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..anatomy.sites import Anatomy, examine
from ..checkpoint.layout import read_json
from ..errors import DamagedCheckpoint, SourceError
from ..loading import quiet
from ..operations.derived import PREFIX
from ..registration import register


def converted_anatomy(root: Path) -> Anatomy:
    """The anatomy of the model that the checkpoint in `root` was converted from, read from its config.json."""
    config = read_json(root / "config.json")
    model_type = config.get("model_type", "")
    if not model_type.startswith(PREFIX) or "eab" not in config:
        raise SourceError(f"{root}: is not a converted checkpoint (config.json has model_type {model_type!r}); give the output of a run")
    base = {key: value for key, value in config.items() if key not in ("eab", "auto_map", "architectures")}
    return examine({**base, "model_type": model_type.removeprefix(PREFIX)})


def load_converted(root: Path, code_is_ours: bool, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """The converted model in `root`, fresh from its files.

    Where its Python files are byte for byte what this version writes (`code_is_ours`), they are loaded as trust_remote_code=True would;
    otherwise the installed runtime is used, and the files are never run.
    """
    placement = {"dtype": dtype, "device_map": None if device == "cpu" else device, "local_files_only": True}
    register()
    try:
        with quiet():
            if not code_is_ours:
                return AutoModelForCausalLM.from_pretrained(root, **placement).eval()
            auto_map = read_json(root / "config.json")["auto_map"]
            config_class, model_class = (
                get_class_from_dynamic_module(auto_map[name], str(root), local_files_only=True)
                for name in ("AutoConfig", "AutoModelForCausalLM")
            )
            config = config_class.from_pretrained(root, local_files_only=True)
            return model_class.from_pretrained(root, config=config, **placement).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{root}: does not load ({str(error).strip().splitlines()[0][:200]})") from error
