"""Which weights turn along when the residual stream is rotated: found by trying, on the model itself.

A part of the model, f(x; w), follows a rotation R of the stream if f(R x; w') = R f(x; w), where w' are its weights,
some of them turned along some of their dimensions. For R near the identity, R = 1 + t A with A antisymmetric, and g the
gradients of <u, f> for any u, that says (Noether's theorem)

    <g_x, A x> + sum_i s_i <g_i, A w_i> = <u, A f>,    s_i = 1 where weight i turns along a dimension, else 0.

One backward pass gives every g, each random A an equation, and least squares give s. The weight e of a norm scales
channels, and does not turn: first, what reads the norm takes it over. Channel j of e and of the norm's bias b times c,
and of what reads them divided by c, is the same function, so that

    e_j g_e,j + b_j g_b,j = sum_i s_i <g_i, w_i>_j    (the sum over all but dimension j)

gives the readers in the same way. No family is known by name: fused experts, routers, gates and parallel blocks are
weights like others. What is found counts only once it is proved, with R itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..anatomy.calls import Call, observing
from ..anatomy.linears import LINEAR, row_dim
from ..errors import DamagedCheckpoint
from ..live.model import Live
from ..live.parts import Part, Weights
from .turning import Gain, HeadSide, HeadValues, Side, changed, folding, is_vector

PROBES = 128  # random A, or twice as many as a part has weights
SOLVED = 1e-3  # relative residual at which equations hold; where a weight is missing it is 0.05 and more
NOISE = 1e-6  # what contributes relatively less than this decides nothing
RANK = 1e-5  # relative size of a singular value that is none


@dataclass(frozen=True)
class Way:
    """How a part follows: norms are folded into what reads them, then weights turn. `fixing`: only if R 1 = 1."""

    gains: tuple[Gain, ...]
    sides: tuple[Side, ...]
    fixing: bool

    def of(self, name: str) -> tuple[list[Side], list[int]]:
        """What becomes of one weight: the gains it takes over along a dimension, and the dimensions it turns along."""
        taken = [(gain.name, dim) for gain in self.gains for reader, dim in gain.readers if reader == name]
        return taken, [dim for side, dim in self.sides if side == name]


def following(part: Part) -> Way | str:
    """How the part follows a rotation of the residual stream; or why it follows none, as a clause."""
    at = gradients(part, part.weights)
    if idle := [name for name in at.idle if isinstance(part.weights[name], nn.Parameter)]:
        return f"{idle[0]} is as wide as the residual stream, and text does not show what it does"
    found = gains(at)
    at = gradients(part, changed(part.weights, folding(found, part.weights)))
    for fixing in (False, True):
        if (turning := sides(at, fixing)) is not None:
            if constant := [name for name, _ in turning if not isinstance(part.weights[name], nn.Parameter)]:
                return f"{constant[0]}, which is no weight, is added to the residual stream"
            return Way(tuple(found), tuple(turning), fixing)
    if (name := _obstacle(part, at.weights)) is not None:
        return f"{name} scales channels of the residual stream, and nothing else can take it over"
    return f"{part.name} depends on the basis of the residual stream"


def _obstacle(part: Part, weights: Weights) -> str | None:
    """The vector that keeps the part from following: with all of them constant but it, it fails."""

    def follows(vectors: Weights) -> bool:
        return sides(gradients(part, {**weights, **vectors}), fixing=True) is not None

    constant = {name: torch.ones_like(weight) for name, weight in weights.items() if weight.shape == (part.width,)}
    if not follows(constant):
        return None
    return next((name for name in constant if not follows({**constant, name: weights[name]})), None)


@dataclass(frozen=True)
class Gradients:
    """Of a random sum of a part's outputs, in which what it adds to the stream is <u, added>; `weights` it was at."""

    u: torch.Tensor
    added: torch.Tensor
    entering: torch.Tensor
    weights: Weights
    of_stream: torch.Tensor
    of_weights: Weights

    @property
    def width(self) -> int:
        return self.entering.shape[-1]

    @property
    def sides(self) -> list[Side]:
        """Each dimension of a weight that is as wide as the stream."""
        return [
            (name, dim) for name, w in self.weights.items() for dim, size in enumerate(w.shape) if size == self.width
        ]

    def rows(self, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (n, d) of a weight along the dimension, and of its gradient."""
        name, dim = side
        weight, gradient = self.weights[name], self.of_weights[name]
        return weight.movedim(dim, -1).reshape(-1, self.width), gradient.movedim(dim, -1).reshape(-1, self.width)

    @property
    def idle(self) -> list[str]:
        """Weights as wide as the stream that have no part in the outputs: whether they turn along cannot be seen."""
        return [name for name, _ in self.sides if self.weights[name].any() and not self.of_weights[name].any()]


def gradients(part: Part, weights: Weights) -> Gradients:
    source = torch.Generator().manual_seed(1)
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    entering = part.entering.detach().requires_grad_()
    with torch.enable_grad():
        outputs = [output for output in part.run(leaves, entering) if output.requires_grad]
        us = [torch.randn(output.shape, generator=source).to(output) for output in outputs]
        loss = torch.stack([(u * output).sum().double() for u, output in zip(us, outputs, strict=True)]).sum()
        inputs = [entering, *leaves.values()]
        first, *rest = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (part.entering, *outputs, first, *rest)):
        raise DamagedCheckpoint(
            f"{part.name} computes NaN or Inf, as its weights or config.json make it; correct config.json, or download "
            "the checkpoint again."
        )
    values = {name: leaf.detach() for name, leaf in leaves.items()}
    return Gradients(us[0], outputs[0].detach(), part.entering, values, first, dict(zip(leaves, rest, strict=True)))


def gains(at: Gradients) -> list[Gain]:
    """Norms whose weight other weights can take over."""
    found: list[Gain] = []
    columns = {}
    for side in at.sides:
        weight, gradient = at.rows(side)
        columns[side] = (weight * gradient).sum(dim=0) * (-1 if is_vector(side[0], at.weights[side[0]]) else 1)
    taken: set[str] = set()  # biases: the same equation holds for them, and a norm's weight stands before its bias
    for name in [name for name, _ in columns if at.weights[name].ndim == 1]:
        others = {side: column for side, column in columns.items() if side[0] != name}
        for offset in (0.0, 1.0) if name not in taken and at.of_weights[name].any() else ():  # some scale by 1 + w
            readers, residual = _solved(others, (at.weights[name] + offset) * at.of_weights[name])
            if residual < SOLVED and not all(is_vector(reader, at.weights[reader]) for reader, _ in readers):
                taken |= {reader for reader, _ in readers}
                if bool((at.weights[name] != at.weights[name][0]).any()):  # else it scales all channels alike
                    found.append(Gain(name, offset, tuple(readers)))
                break
    return found


def sides(at: Gradients, fixing: bool) -> list[Side] | None:
    """Where weights turn along with the stream; None if the part follows no rotation of it.

    `fixing`: only rotations R with R 1 = 1, which commute with subtracting the mean, as LayerNorm does.
    """
    source, every = torch.Generator().manual_seed(2), at.sides
    a, b = torch.randn(2, at.width, max(PROBES, 2 * len(every)), generator=source).to(at.entering)
    if fixing:
        a, b = a - a.mean(dim=0), b - b.mean(dim=0)

    def equation(vectors: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:  # <g, A v>, A = a b^T - b a^T
        v, g = (part.reshape(-1, at.width).to(a) for part in (vectors, gradient))
        of_each: torch.Tensor = ((g @ a) * (v @ b) - (g @ b) * (v @ a)).double().sum(dim=0)
        return of_each

    columns = {side: equation(*at.rows(side)) for side in every}
    found, residual = _solved(columns, equation(at.added, at.u) - equation(at.entering, at.of_stream))
    return found if residual < SOLVED else None


def _solved(columns: dict[Side, torch.Tensor], target: torch.Tensor) -> tuple[list[Side], float]:
    """The columns (m,) whose sum is `target` (m,), and the relative residual of that."""
    matrix, target = torch.stack(list(columns.values()), dim=1).double().cpu(), target.double().cpu()
    norms = matrix.norm(dim=0)
    norms = torch.where(norms > NOISE * norms.max(), norms, torch.inf)
    # Relations among the columns themselves (another norm's) are singular values of the size of rounding: cut off.
    share = torch.linalg.lstsq(matrix / norms, target[:, None], rcond=RANK, driver="gelsd").solution[:, 0] / norms
    chosen = share > 0.5
    size = torch.cat([norms[chosen], target.norm()[None]]).max().clamp(min=torch.finfo(target.dtype).tiny)
    residual = ((matrix[:, chosen].sum(dim=1) - target).norm() / size).item()
    return [side for side, yes in zip(columns, chosen.tolist(), strict=True) if yes], residual


# ---- heads


def heads(live: Live, part: Part) -> list[HeadValues]:
    """For each attention site of the part, where values of heads are written and read, found bit for bit.

    A site is left out where something stands between its attention and the linear layers: a norm, a gate, a scale.
    """
    names = {module: name for name, module in live.model.named_modules()}
    outputs: dict[nn.Module, torch.Tensor] = {}
    inputs: dict[nn.Module, torch.Tensor] = {}
    attended: list[tuple[Call, torch.Tensor]] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        inputs[module], outputs[module] = args[0], output if isinstance(output, torch.Tensor) else output[0]

    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(observing(None, lambda call, heads: attended.append((call, heads))))
        for module in live.model.get_submodule(part.name).modules():
            if isinstance(module, LINEAR):
                undo.callback(module.register_forward_hook(keep).remove)
        part.run(part.weights, part.entering)
    found = []
    for call, summed in attended:
        values = call.value.transpose(1, 2)  # (B, S, H, D)
        written, read = _places(outputs, values), _places(inputs, summed)
        if len(written) == len(read) == 1 and not hasattr(call.module, "head_norm"):
            (writer, rows), (reader, columns) = *written.items(), *read.items()
            read_from = HeadSide(f"{names[reader]}.weight", 1 - row_dim(reader), columns, False)
            sides = [*_written(writer, names[writer], rows), read_from]
            if (slots := f"{names[call.module]}.attention_bias.value") in part.weights:
                sides.append(HeadSide(slots, 2, None, True))
            found.append(HeadValues(values.shape[-1], tuple(sides)))
    return found


def _written(module: nn.Module, name: str, rows: torch.Tensor) -> Iterator[HeadSide]:
    yield HeadSide(f"{name}.weight", row_dim(module), rows, True)
    if module.bias is not None:
        yield HeadSide(f"{name}.bias", 0, rows, True)


def _places(states: dict[nn.Module, torch.Tensor], heads: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
    """Which of `states` hold `heads` (B, S, H, D), and where."""
    return {module: found for module, held in states.items() if (found := _channels(held, heads)) is not None}


def _channels(states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor | None:
    """Which channels of `states` (..., C) hold `heads` (B, S, H, D): (H', D), each head once; None if they do not."""
    count, dim = heads.shape[-2:]
    wanted = heads.reshape(-1, count * dim)
    if states.numel() != len(wanted) * states.shape[-1]:
        return None
    places = {column: index for index, column in enumerate(_columns(states.reshape(len(wanted), -1)))}
    channels = torch.tensor([places.get(column, -1) for column in _columns(wanted)]).view(count, dim).unique(dim=0)
    whole = bool((channels >= 0).all()) and len(channels.unique()) == channels.numel()
    return channels.to(states.device) if whole else None


def _columns(states: torch.Tensor) -> Iterable[bytes]:
    return (column.numpy().tobytes() for column in states.T.contiguous().cpu())
