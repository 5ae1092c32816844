"""Units of an encoder's MLPs that are left out: where zeros in weights do that, found by trying, on the model
itself."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..anatomy.linears import LINEAR, row_dim, widths
from ..anatomy.sites import Anatomy
from ..errors import UnsupportedModel
from ..live.model import Live
from ..live.places import down_projections, name_in
from ..live.port import answer
from .base import Alter


def projections_of(anatomy: Anatomy) -> list[str]:
    """Names in the trunk of the down projections. UnsupportedModel where there are none."""
    blank = Live(anatomy.blank, anatomy)
    names = [name_in(blank, module) for module in down_projections(blank).values()]
    if not names:
        raise UnsupportedModel(f"{anatomy.model_type}: its blocks have no MLP whose units could be told apart")
    return names


def mlp_parameters(anatomy: Anatomy, projections: Sequence[str]) -> list[str]:
    """Parameters of the trunk in which units may be left out: of down projections, and of what is as wide before
    them."""
    trunk, found = anatomy.blank.get_submodule(anatomy.trunk), []
    for projection in projections:
        width = widths(trunk.get_submodule(projection))[0]
        for name in (projection, *_before(anatomy, trunk, projection, width)):
            module = trunk.get_submodule(name)
            found += [f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)]
    return found


def _before(anatomy: Anatomy, trunk: nn.Module, projection: str, width: int) -> list[str]:
    """Names of the linear layers of the same block that may make what enters `projection`."""
    block = next(block for block in anatomy.blocks if projection.startswith(f"{block}."))
    named = trunk.get_submodule(block).named_modules(prefix=block)
    return [name for name, module in named if isinstance(module, LINEAR) and widths(module)[1] in (width, 2 * width)]


def left_out_by(live: Live, units: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Parameter of the trunk -> dimension and places where zeros leave `units` out, by down projection.

    Rows of the layer before it, where zeros there are proved, on the model itself, to keep those units at exactly zero:
    then nothing large enters the down projection either, which scales of inputs are taken from. Else columns of its
    own.
    """
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for projection, some in units.items():
        down: Any = live.trunk.get_submodule(projection)
        width = widths(down)[0]
        for name in _before(live.anatomy, live.trunk, projection, width):
            module: Any = live.trunk.get_submodule(name)
            if module is down:
                continue
            for start in range(0, widths(module)[1] or 0, width):
                rows = tuple(start + unit for unit in some)
                if _keeps_at_zero(live, module, rows, down, some):
                    dims = {"weight": row_dim(module), "bias": 0}
                    for part, parameter in module.named_parameters(recurse=False):
                        if bool(parameter.index_select(dims[part], torch.tensor(rows, device=parameter.device)).any()):
                            found[f"{name}.{part}"] = dims[part], rows  # what is zeros already stays what it is
                    break
            else:
                continue
            break
        else:
            found[f"{projection}.weight"] = 1 - row_dim(down), tuple(some)
    return found


@torch.no_grad()
def _keeps_at_zero(live: Live, module: Any, rows: Sequence[int], down: nn.Module, units: Sequence[int]) -> bool:
    """Whether units of what enters `down` are zeros where those rows of `module` are."""
    entered: list[torch.Tensor] = []

    def silence(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor(rows, device=output.device), 0.0)

    def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        entered.append(args[0][..., list(units)])

    with contextlib.ExitStack() as undo:
        undo.callback(module.register_forward_hook(silence).remove)
        undo.callback(down.register_forward_pre_hook(look).remove)
        answer(live)
    return bool(entered) and not any(bool(one.any()) for one in entered)


def zeros_at(units: Sequence[int], dim: int) -> Alter:
    """What puts zeros into a weight at `units` of a dimension."""

    def alter(weight: torch.Tensor) -> torch.Tensor:
        return weight.index_fill(dim, torch.tensor(units), 0.0)

    return alter
