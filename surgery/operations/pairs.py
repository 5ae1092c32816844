"""Where a channel between two layers can be scaled without changing the model: found by trying, on the model itself.

Linear layers read y; what makes y is linear in its own rows. Rows of the source times 1/s_j and columns of the readers
times s_j then leave the model the function it was (cross-layer equalisation, Nagel et al. 2019, arXiv 1906.04721). With
s_j a power of two nothing is rounded either: every product is the same, and so is every sum, bit for bit. No family is
known by name here: a pair counts only if the block that holds it gives the same bits with random powers of two applied.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..anatomy.linears import LINEAR, as_rows, row_dim
from ..errors import UnsupportedModel
from ..live.model import Live
from ..live.places import down_projections
from ..live.port import answer

TRIED_POWERS = 3  # proofs scale by 2^-3 to 2^3
PART = 2**22  # numbers of a parameter that are looked at in one go
STORED = (torch.float16, torch.bfloat16)  # what weights in memory may have been read from


@dataclass(frozen=True)
class Pair:
    """Channel j of what `readers` read is row `start` + j of `source`; names of modules in the trunk.

    `kind` is "down" (the source is a linear layer, the reader its MLP's down projection) or "norm" (the source is one).
    """

    kind: str
    source: str
    start: int
    width: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """A parameter that a pair scales by 2^(sign * exponent) in channels `start` .. of dimension `dim`."""

    name: str
    tensor: nn.Parameter
    dim: int
    start: int
    sign: int


def sides(trunk: nn.Module, pair: Pair) -> list[Side]:
    """Every parameter that the pair scales: weight and bias of the source, weights of the readers."""
    source: Any = trunk.get_submodule(pair.source)
    found = [Side(f"{pair.source}.weight", source.weight, row_dim(source), pair.start, -1)]
    if getattr(source, "bias", None) is not None:
        found.append(Side(f"{pair.source}.bias", source.bias, 0, pair.start, -1))
    for name in pair.readers:
        reader: Any = trunk.get_submodule(name)
        found.append(Side(f"{name}.weight", reader.weight, 1 - row_dim(reader), 0, 1))
    return found


def scaled(side: Side, exponents: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, a value of the side's parameter, with its channels scaled; exponents (width,), whole numbers."""
    return tensor.detach() * _factor(side, exponents, tensor)


def _factor(side: Side, exponents: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    factor = torch.ones(tensor.shape[side.dim], dtype=tensor.dtype, device=tensor.device)
    powers = torch.exp2((side.sign * exponents).double()).to(factor)
    factor[side.start : side.start + len(exponents)] = powers
    return factor.view([-1 if dim == side.dim else 1 for dim in range(tensor.ndim)])


def without_loss(every: Sequence[Side], exponents: torch.Tensor) -> torch.Tensor:
    """exponents (width,), nearer to 0 where a weight would overflow or lose bits below the least normal number.

    Weights that are float16 or bfloat16 numbers stay so: a checkpoint that stores them as such stores them exactly.
    """
    exponents = exponents.clone()
    while True:
        lossy = torch.zeros(len(exponents), dtype=torch.bool)
        for side in every:
            lossy |= _lossy(side, exponents)
        lossy &= exponents != 0  # NaN is no number, and cannot be scaled at all
        if not lossy.any():
            return exponents
        exponents[lossy] -= exponents[lossy].sign()


def _lossy(side: Side, exponents: torch.Tensor) -> torch.Tensor:
    """Channels (width,) whose scaling does not come out exactly; looked at a part of the parameter at a time."""
    before, factor = side.tensor.detach(), _factor(side, exponents, side.tensor)
    rows = max(1, PART // max(1, before[:1].numel()))
    stored = [
        dtype for dtype in STORED if all(torch.equal(part.to(dtype).to(part), part) for part in before.split(rows))
    ]
    others = [dim for dim in range(before.ndim) if dim != side.dim]
    counts = []
    for start in range(0, len(before), rows):
        part = before[start : start + rows]
        by = factor if side.dim else factor[start : start + rows]
        after = part * by
        wrong = after / by != part
        for dtype in stored:
            wrong |= after.to(dtype).to(part) != after
        counts.append(wrong.sum(dim=others) if others else wrong.long())
    lossy = torch.cat(counts) if side.dim == 0 else torch.stack(counts).sum(dim=0)
    return lossy[side.start : side.start + len(exponents)].cpu() > 0


@torch.no_grad()
def apply(every: Sequence[Side], exponents: torch.Tensor) -> None:
    """Scale in place; `apply` of the opposite exponents takes it back, to the bit."""
    for side in every:
        side.tensor.copy_(scaled(side, exponents, side.tensor))


def touches(side: Side, exponents: torch.Tensor) -> bool:
    """Whether scaling changes the parameter at all: a bias of zeros it does not."""
    channels = side.tensor.detach().narrow(side.dim, side.start, len(exponents))
    return bool(channels.index_select(side.dim, exponents.nonzero().flatten().to(channels.device)).any())


# ---- finding


@torch.no_grad()
def find(live: Live) -> list[Pair]:
    """Every pair of the model whose scaling was proved on it, in the order of its blocks.

    Each block runs inside a forward pass of the model over a few random tokens, so that it gets what it always gets:
    once to see who reads what, then once for each candidate. The model is left as it was.
    """
    trunk = live.trunk
    found: list[Pair] = []
    if live.layers is None and any(parameter.is_meta for parameter in trunk.parameters()):
        raise UnsupportedModel(
            "smoothing scales weights in memory, and some of these are offloaded; give a --device that holds them all."
        )
    alone = _alone(live)
    downs = down_projections(live)
    with contextlib.ExitStack() as undo:
        for index, name in enumerate(live.anatomy.blocks):

            def entering(
                block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index, name: str = name
            ) -> None:
                def run() -> Any:
                    return block.forward(*map(_copy, args), **{key: _copy(value) for key, value in kwargs.items()})

                found.extend(_pairs(trunk, name, downs.get(index), run, alone))

            block = trunk.get_submodule(name)
            undo.callback(block.register_forward_pre_hook(entering, with_kwargs=True).remove)
        answer(live)
    return found


def _alone(live: Live) -> Callable[[Side], bool]:
    """Whether a parameter belongs to one module under one name: shared ones must not be scaled for one of its users.

    One that is not loaded has no memory, and is the same object under all of its names.
    """
    users = {
        name: parameter.data_ptr() or id(parameter)
        for name, parameter in live.model.named_parameters(remove_duplicate=False)
    }
    count = Counter(users.values())
    return lambda side: count[users[f"{live.anatomy.lead}{side.name}"]] == 1


def _copy(argument: Any) -> Any:
    """A tensor copied: some blocks write into what they are given."""
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


@dataclass
class _Seen:
    """One run of a block: what each linear layer read and each norm gave, by name, and the block's output."""

    read: dict[str, list[torch.Tensor]]
    gave: dict[str, list[torch.Tensor]]
    output: list[torch.Tensor]


def _watched(trunk: nn.Module, block: str, run: Callable[[], Any]) -> _Seen:
    seen = _Seen({}, {}, [])
    with contextlib.ExitStack() as undo:
        for name, module in trunk.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, LINEAR):

                def reads(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    seen.read.setdefault(name, []).append(args[0])

                undo.callback(module.register_forward_pre_hook(reads).remove)
            elif _is_vector(module._parameters.get("weight")):

                def gives(_: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                    seen.gave.setdefault(name, []).append(output)

                undo.callback(module.register_forward_hook(gives).remove)
        output = run()
    outputs = output if isinstance(output, (tuple, list)) else [output]
    seen.output = [part for part in outputs if isinstance(part, torch.Tensor)]
    return seen


def _is_vector(weight: torch.Tensor | None) -> bool:
    return weight is not None and weight.ndim == 1 and weight.is_floating_point()


def _pairs(
    trunk: nn.Module, block: str, down: nn.Module | None, run: Callable[[], Any], alone: Callable[[Side], bool]
) -> Iterator[Pair]:
    """The proved pairs of one block."""
    seen = _watched(trunk, block, run)
    for candidates in (*_downs(trunk, block, down, seen), *_norms(trunk, seen)):
        for pair in candidates:
            if proved(trunk, block, pair, run, seen, alone):
                yield pair
                break


def _downs(trunk: nn.Module, block: str, down: nn.Module | None, seen: _Seen) -> Iterator[list[Pair]]:
    """What may make the input of the down projection: a linear layer as wide, or half of one twice as wide."""
    names = {module: name for name, module in trunk.get_submodule(block).named_modules(prefix=block)}
    if not isinstance(down, LINEAR) or names[down] not in seen.read:
        return
    reader, candidates = names[down], []
    width = seen.read[reader][0].shape[-1]
    for name in seen.read:
        rows = len(as_rows(trunk.get_submodule(name)))
        if name != reader and rows in (width, 2 * width):
            candidates += [Pair("down", name, start, width, (reader,)) for start in range(rows - width, -1, -width)]
    yield candidates


def _norms(trunk: nn.Module, seen: _Seen) -> Iterator[list[Pair]]:
    """Each norm with the linear layers that read its very output."""
    for name, outputs in seen.gave.items():
        output, width = outputs[0], len(trunk.get_parameter(f"{name}.weight"))
        if len(outputs) == 1 and isinstance(output, torch.Tensor) and output.shape[-1:] == (width,):
            readers = tuple(
                reader
                for reader, read in seen.read.items()
                if any(part.data_ptr() == output.data_ptr() and part.shape[-1] == width for part in read)
            )
            yield [Pair("norm", name, 0, width, readers)] if readers else []


def proved(
    trunk: nn.Module, block: str, pair: Pair, run: Callable[[], Any], seen: _Seen, alone: Callable[[Side], bool]
) -> bool:
    """Whether random powers of two, different in each channel, change what is read by just that, and nothing after.

    Equal means equal bits, in the block's whole output; `seen` is the block as it was. What reads the source's output
    without being among the readers, a norm that scales by 1 + w, or an activation that is not homogeneous cannot pass.
    """
    every = sides(trunk, pair)
    if not all(alone(side) and side.tensor.is_floating_point() for side in every):
        return False
    exponents = without_loss(every, _random_exponents(pair.width))
    if not exponents.any():  # float16 weights near its least normal number cannot be scaled, and prove nothing
        return False
    apply(every, exponents)
    try:
        after = _watched(trunk, block, run)
    finally:
        apply(every, -exponents)
    for name in pair.readers:
        before, scaled_by = seen.read[name], torch.exp2(-exponents.double())
        if len(before) != 1 or len(after.read[name]) != 1 or not before[0].any():
            return False
        if not torch.equal(after.read[name][0], before[0] * scaled_by.to(before[0])):
            return False
    same = [torch.equal(a, b) for a, b in zip(seen.output, after.output, strict=True)]
    return bool(same) and all(same)


def _random_exponents(width: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(1)
    signs = 2 * torch.randint(2, (width,), generator=source) - 1
    return signs * torch.randint(1, TRIED_POWERS + 1, (width,), generator=source)
