"""How much memory makes a model come layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from surgery.anatomy.fit import examine_stored
from surgery.checkpoint.config import read_config
from surgery.checkpoint.layout import read_layout
from surgery.checkpoint.quantised import quantised
from surgery.converted.described import read_described
from surgery.converted.reading import is_converted
from surgery.live.memory import Needs


def least(root: Path, packs: bool = False) -> int:
    """The least memory that will do for the checkpoint in `root`, and too little for all weights at once."""
    layout, config = read_layout(root), read_config(root)
    anatomy = read_described(root).anatomy if is_converted(root) else examine_stored(config, layout)[0]
    packed = quantised(root, config, layout)
    rounds = packed is not None and packed.rounds_activations and not is_converted(root)  # fitted in float64
    needs = Needs.of(anatomy, layout, torch.float64 if rounds else torch.float32, packs)
    assert needs.by_layers < needs.resident
    return needs.by_layers
