"""Packed weights that come layer by layer: unpacked once for a model and its twins, and let go with their unit."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import pytest
import torch
from helpers.memory import least
from helpers.packed import COMPRESSED, save_packed
from torch import nn

from surgery.anatomy.fit import examine_stored
from surgery.checkpoint.config import read_config
from surgery.checkpoint.layout import read_layout
from surgery.live.loading import live_original
from surgery.live.memory import Place
from surgery.live.model import Live


def held(*models: nn.Module) -> int:
    """Bytes of all tensors that the models hold, each storage once; placeholders of one number are nothing."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for size in storages.values() if size > 8)


def alive() -> int:
    """Bytes of all tensors of two dimensions that there are, each storage once."""
    gc.collect()
    plain = (one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter))  # others may hold no memory
    tensors = [one for one in plain if not one.is_meta and one.ndim == 2]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def opened(root: Path, form: str) -> Live:
    """As operations are fitted on it: in float64 where layers round what enters them."""
    anatomy = examine_stored(read_config(root), read_layout(root))[0]
    dtype = torch.float32 if form.startswith("w4a16") else torch.float64
    return live_original(root, anatomy, Place(memory=least(root)), dtype)


@pytest.mark.parametrize("form", COMPRESSED)
def test_twins_share_what_is_unpacked(form: str, tmp_path: Path) -> None:
    root = save_packed(tmp_path / "source", form)
    live, tokens = opened(root, form), torch.arange(12)[None]
    assert live.layers is not None
    with contextlib.ExitStack() as stack, torch.no_grad():
        twins = [stack.enter_context(live.apart()) for _ in range(4)]
        live.layers.load(f"{live.anatomy.lead}{live.anatomy.blocks[0]}")
        models = [live.model, *(twin.model for twin in twins)]
        assert held(*models) == held(live.model)
        wanted = live.model(input_ids=tokens).logits
        for twin in twins:
            assert torch.equal(twin.model(input_ids=tokens).logits, wanted)


@pytest.mark.parametrize("form", ["w8a8 static", "w4a16"])
def test_nothing_stays_of_twins_or_of_what_was_packed(form: str, tmp_path: Path) -> None:
    """All units are pinned: they are there unpacked, and their packed values are not kept beside."""
    root = save_packed(tmp_path / "source", form)
    before = alive()
    live = opened(root, form)
    assert live.layers is not None
    live.layers.pin(10**9)
    with torch.no_grad():
        live.model(input_ids=torch.arange(12)[None])
        once = alive()
        plain = sum(p.numel() * live.model.dtype.itemsize for p in live.anatomy.blank.parameters() if p.ndim == 2)
        assert plain <= once - before <= 1.1 * plain
        for _ in range(3):
            with live.apart() as twin:
                twin.model(input_ids=torch.arange(12)[None])
    assert alive() <= once * 1.01
