"""Loading a converted checkpoint as users do, without running code from strangers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..anatomy.classes import ANY, CAUSAL
from ..anatomy.packed import loadable
from ..anatomy.quiet import quiet
from ..anatomy.sites import Anatomy
from ..anatomy.tower import dropping_none
from ..checkpoint.layout import read_layout
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.regular import read_json
from ..errors import DamagedCheckpoint, SourceError, brief
from ..live.by_layers import ByLayers, loading_by
from ..live.loading import from_files, require_fit, require_memory
from ..live.memory import HERE, Place
from ..live.model import Live
from ..live.port import TEXT, Port
from .derived import derive
from .described import AGAIN
from .parts import converted_from
from .registration import register


def is_converted(root: Path) -> bool:
    """Whether a run wrote `root`, or `surgery pretrain`, whose variants have slots or norms and no manifest."""
    if os.path.isfile(root / MANIFEST):  # pathlib raises where a name is longer than the disk allows
        return True
    config = root / "config.json"
    return os.path.isfile(config) and converted_from(read_json(config).get("model_type")) is not None


def live_converted(root: Path, anatomy: Anatomy, place: Place = HERE, port: Port = TEXT) -> Live:
    """`load_converted`, wherever it is to compute: resident, or layer by layer where it does not fit."""
    by_layers = place.by_layers(anatomy, read_layout(root))
    return Live(load_converted(root, device=place.device, by_layers=by_layers), anatomy, port)


def require_converted(root: Path) -> None:
    """SourceError unless `root` is a directory that looks like the output of a run, whole or damaged."""
    if not os.path.isdir(root):
        raise SourceError(f"{str(root):.200} is not a directory; give the output of a run.")
    if not (root / MANIFEST).exists() and not is_converted(root):
        raise SourceError(f"{root} is not a converted checkpoint: it has no {MANIFEST}; give the output of a run.")


def load_converted(
    root: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", by_layers: ByLayers | None = None
) -> PreTrainedModel:  # fmt: skip
    """The converted model in `root`, fresh from its files, through AutoModelForCausalLM; an encoder, which is of no
    such class, through that Auto class which loads what its config.json calls itself.

    The class is the installed one, and the Python files in `root` are never run; the integrity check says whether they
    are the same. `by_layers`: weights come when they are called for. Raises DamagedCheckpoint where tensors
    and config do not fit.
    """
    register()
    try:
        with quiet(), loading_by(by_layers, root) as finish:
            config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
            config = loadable(dropping_none(config))
            model, report = from_files(_auto_of(config), root, config, dtype, device)
    except Exception as error:  # of any class: transformers trusts the types of what is in JSON files
        require_memory(root, error)
        raise DamagedCheckpoint(f"{root} does not load ({brief(error)}); {AGAIN}.") from error
    require_fit(root, model, report)
    with quiet():
        return finish(model.eval(), config, dtype)


def _auto_of(config: PreTrainedConfig) -> Any:
    """The Auto class that loads the class which a converted checkpoint says it is of."""
    wanted, found = (config.architectures or [""])[0], converted_from(config.model_type)
    assert found is not None  # `register` knows no other
    classes = derive(*found).classes
    if CAUSAL in classes and not getattr(config, "eab", {}).get("sees_all"):
        return AutoModelForCausalLM
    return getattr(modeling_auto, next((auto for auto, name in classes.items() if name == wanted), ANY))
