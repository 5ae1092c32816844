"""Whether what is read stands where the anatomy says, before the first block."""

from __future__ import annotations

import torch

from ..errors import UnsupportedModel, brief
from .model import Live
from .places import on_layer
from .port import Images, Sound, Words


class _Enough(Exception):
    """Ends a pass at the first block."""


def require_places(live: Live, given: torch.Tensor) -> None:
    """UnsupportedModel unless what is `given` (N, ...) becomes the tokens that `live.port` says."""
    (_row if isinstance(live.port, (Sound, Words)) else _patches)(live, given)


def _patches(live: Live, pixels: torch.Tensor) -> None:
    """Two images, alike but for one patch, are two rows that differ in the token of that patch alone."""
    port, patching, kind = live.port, live.anatomy.patching, live.anatomy.model_type
    assert isinstance(port, Images) and patching is not None and patching.patch is not None
    (rows, columns), (height, width) = port.grid, patching.patch
    row, column = rows // 2, (2 * columns) // 3
    pair = pixels[:1].repeat(2, 1, 1, 1)
    pair[1, :, row * height : (row + 1) * height, column * width : (column + 1) * width] += 1.0
    try:
        states = _entered(live, pair)
    except Exception as error:  # of any class: its code was made for images of one size
        made = f"{patching.size[0]} x {patching.size[1]}"
        raise UnsupportedModel(
            f"{kind}: it does not take images of {pixels.shape[2]} x {pixels.shape[3]}, as its processor makes them "
            f"({brief(error)}); its config.json says {made}"
        ) from error
    if states.shape[:2] != (2, port.tokens):
        raise UnsupportedModel(
            f"{kind}: two images of {rows} x {columns} patches become {tuple(states.shape)} and not (2, {port.tokens}, "
            "d), so what stands where is not known"
        )
    changed = (states[0] != states[1]).any(dim=-1).nonzero().flatten().tolist()
    if changed != [port.special + row * columns + column]:
        raise UnsupportedModel(
            f"{kind}: its tokens do not stand as its patches do, after all others and row by row, so what stands where "
            "is not known"
        )


def _row(live: Live, given: torch.Tensor) -> None:
    """As many tokens as were counted without weights. Frames overlap, and norms may run over all of a recording: which
    of them a change reaches is no test."""
    port, kind = live.port, live.anatomy.model_type
    assert isinstance(port, Images)
    try:
        states = _entered(live, given[:2])
    except Exception as error:  # of any class: model code
        raise UnsupportedModel(f"{kind}: it does not take such {port.called.many} ({brief(error)})") from error
    count = len(given[:2])
    if states.shape[:2] != (count, port.tokens):
        raise UnsupportedModel(
            f"{kind}: {count} {port.called.many} of {port.tokens} {port.called.parts} become {tuple(states.shape)}, so "
            "what stands where is not known"
        )


@torch.inference_mode()
def _entered(live: Live, given: torch.Tensor) -> torch.Tensor:
    """What enters the first block; what is `given`, where nothing does."""
    port = live.port
    assert isinstance(port, Images)
    entered: list[torch.Tensor] = []

    def look(states: torch.Tensor) -> None:
        entered.append(states)
        raise _Enough

    hook = on_layer(live, 0, look)
    try:
        live.trunk(**port.given(live, given))
    except _Enough:
        pass
    finally:
        hook.remove()
    return entered[0] if entered else given
