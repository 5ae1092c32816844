"""int8 executed for real on the CPU, beside the simulation: torchao's Int8Tensor, whose products are integers.

A linear layer's inputs become int8, torch._int_mm sums products of int8 in int32 (oneDNN: AMX or VNNI where there is
one), and the scales multiply the sums. Weight scales and static activation scales are those of the simulation, so that
a layer differs only where a value lies on the edge between two integers, and by -128, which integers have and the
simulation does not (values far below every calibrated one become it): on SmolLM2, given the same inputs, by at most
about 1% of what quantisation changes. Through the whole model such flips grow into another draw of the same rounding
noise: over 2,000 tokens, static, 0.02 nats per token, as the simulation from itself with scales changed by 1e-5.
Dynamic and per-token scales are torchao's own, max |x| / 127.5 against 127. Attention and norms stay in float.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ..anatomy.linears import as_rows
from ..errors import SourceError
from .loading import require_in_memory
from .model import Live
from .quantised import Scheme, loaded_linears

MOST = 127


def require_int8(device: str) -> None:
    """SourceError unless int8 can be executed here: torchao, the CPU, and kernels whose sums do not overflow."""
    way_out = "or leave 'executed' out of the recipe"
    try:
        _torchao()
    except ImportError as error:
        raise SourceError(
            "'executed' in the recipe runs int8 for real, which needs torchao: "
            f"pip install 'checkpoint-surgery[int8]', {way_out}."
        ) from error
    if device == "auto" or torch.device(device).type != "cpu":
        raise SourceError(f"--device {device}: int8 is executed on the CPU alone; give --device cpu, {way_out}.")
    ends = torch.full((4, 256), MOST, dtype=torch.int8)
    if int(torch._int_mm(ends, -ends.T.contiguous()).max()) != -256 * MOST**2:
        raise SourceError(
            f"this processor's int8 kernels overflow (it has no VNNI), so 'executed' would measure that; "
            f"use another machine, {way_out}."
        )


def _torchao():
    from torchao.quantization import Int8Tensor, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    return Int8Tensor, PerRow, PerTensor, QuantizeTensorToInt8Kwargs


@contextlib.contextmanager
def executing(live: Live, scheme: Scheme, ranges: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
    """The linear layers in the blocks of the model (on the CPU) compute in int8; at the end as they did before.

    `scheme` has 8 bits of weights and of activations; `ranges` as for `quantised`.
    """
    if scheme.calibrated and ranges is None:
        raise ValueError("static scales need the ranges of calibration text")
    with contextlib.ExitStack() as undo:
        require_in_memory(live.model, "executing int8")
        for name, module in loaded_linears(live).items():
            module.forward = _forward(module, scheme, (ranges or {}).get(name) if scheme.calibrated else None)
            undo.callback(delattr, module, "forward")  # the instance attribute; the class's method is back
        yield


def _forward(module: Any, scheme: Scheme, peak: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """`module.forward` in int8. `peak`: the largest |input| of calibration, for static scales."""
    Int8Tensor, PerRow, PerTensor, Activations = _torchao()
    weight = as_rows(module).detach().contiguous()
    static = scheme.ranges == "static"
    least = torch.finfo(weight.dtype).tiny  # what is zero throughout, or was never calibrated, stays (about) zero
    integers = Int8Tensor.from_hp(
        weight,
        PerRow(),
        scale=(weight.abs().amax(dim=1, keepdim=True) / MOST).clamp(min=least),
        act_quant_kwargs=Activations(PerRow() if scheme.ranges == "per_token" else PerTensor()),
        act_quant_scale=_scale(peak, weight).clamp(min=least) if static else None,
    )

    def forward(values: torch.Tensor) -> torch.Tensor:
        if not values.numel():  # an expert that got no token
            return values.new_empty(*values.shape[:-1], len(weight))
        return F.linear(values.reshape(-1, values.shape[-1]), integers, module.bias).unflatten(0, values.shape[:-1])

    return forward


def _scale(peak: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """(1, 1), one scale for all inputs."""
    return like.new_zeros(1, 1) if peak is None else (peak.to(like) / MOST).reshape(1, 1)
