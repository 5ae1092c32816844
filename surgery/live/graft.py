"""What a live model is given besides its weights: the parts of a folded prefix, and norms of its heads.

They are put in place and taken out again here, and what `config.json` says of them is defined here. Families that are
off the seam are brought onto it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..anatomy.sites import Anatomy
from ..errors import DamagedCheckpoint, UnsupportedModel
from ..parts import KINDS, every_shape
from ..parts import shapes as declared
from ..runtime.eab_added import require_added
from ..runtime.eab_families import ADAPTERS
from ..runtime.eab_head_norm import install_norms
from ..runtime.eab_runtime import install
from .model import Live
from .together import together

Norms = dict[str, dict[str, torch.Tensor]]  # site name -> weight (E,) or (Hq, E), and gate (Hq,) unless it is pure

EAB_FORMAT = 1
HEAD_NORM_FORMAT = 1
EPS = 1e-6  # added to the mean square of a head, so that one that brings nothing back is not divided by zero


# ---- a prefix


@dataclass(frozen=True)
class Fold:
    """A prefix (token ids) as parts of the model, slots visible "as_prefix" or "always". Of an empty prefix there are
    none, unless they were estimated. `tensors`: what each holds, by its name within the trunk."""

    prefix: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]
    visible: str

    @property
    def n(self) -> int:
        """How many slots a site has."""
        return len(self.prefix) or next((len(tensor) for tensor in self.tensors.values()), 0)


def eab_config(anatomy: Anatomy, prefix: Sequence[int], visible: str, n: int | None = None) -> dict:
    """`config.eab` of a model in which `prefix` is folded, or that has `n` slots of no prefix."""
    return {
        "format": EAB_FORMAT, "prefix_ids": list(prefix), **anatomy.eab(len(prefix) if n is None else n, visible)
    }  # fmt: skip


def fold(live: Live, prefix: Sequence[int], visible: str) -> Fold:
    """What `prefix` (token ids) leaves at every site and mixer of the original model, in the dtype it runs in.

    An empty prefix gives an empty fold. UnsupportedModel where attention runs elsewhere than in the sites,
    DamagedCheckpoint where something is not finite.
    """
    return folds(live, [prefix], visible)[0]


@torch.no_grad()
def folds(live: Live, prefixes: Sequence[Sequence[int]], visible: str) -> list[Fold]:
    """The fold of each of `prefixes`, in one pass over the weights; errors as `fold`."""
    kind = live.anatomy.model_type
    now: ContextVar[dict[str, torch.Tensor]] = ContextVar("now")  # of whichever prefix computes

    def keep(name: str, tensor: torch.Tensor) -> None:
        if name in now.get():
            raise UnsupportedModel(
                f"{kind}: {name.rpartition('.')[0]} would be filled twice while the prefix runs once"
            )
        now.get()[name] = tensor

    def parts_of(prefix: Sequence[int]) -> dict[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = {}
        if prefix:
            now.set(parts)
            tokens = torch.tensor([list(prefix)], device=live.device)
            mask = torch.ones_like(tokens)
            if live.port.predicts:
                live.model(input_ids=tokens, attention_mask=mask, use_cache=False)
            else:
                live.trunk(input_ids=tokens, attention_mask=mask)
        return parts

    with on_the_seam(live), contextlib.ExitStack() as reading:
        for part in KINDS:
            reading.enter_context(part.reading(live.anatomy, live.trunk, keep))
        try:
            found = together(live.layers, [functools.partial(parts_of, prefix) for prefix in prefixes])
        except ValueError as refusal:  # what the runtime says to a call that it cannot serve
            raise UnsupportedModel(f"{kind}: {refusal}") from refusal
    return [
        Fold(tuple(prefix), _sound(live, len(prefix), parts), visible)
        for prefix, parts in zip(prefixes, found, strict=True)
    ]


def _sound(live: Live, n: int, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`parts` of a prefix of n tokens in the order of the file."""
    names = every_shape(live.anatomy.eab(n, "as_prefix"))
    if missing := [name for name in names if name not in parts]:
        module = missing[0].rpartition(".")[0].rpartition(".")[0]
        raise UnsupportedModel(f"{live.anatomy.model_type}: {module} did not run while the prefix did")
    for name in names:
        if not bool(torch.isfinite(parts[name]).all()):
            raise DamagedCheckpoint(
                f"{name}: what the prefix leaves there is NaN or Inf, as its weights or config.json make it; correct "
                "config.json, or download the checkpoint again."
            )
    return {name: parts[name] for name in names}


def grafted(live: Live, fold: Fold) -> contextlib.AbstractContextManager[None]:
    """The original model with the parts of `fold` in place, within a `with` block."""
    return installed(live, eab_config(live.anatomy, fold.prefix, fold.visible, fold.n), fold.tensors)


def held_parts(live: Live, fold: Fold) -> Fold:
    """`fold` as the live model holds it: tuning may have trained it."""
    held: dict[str, torch.Tensor] = {}
    for kind, shapes in declared(eab_config(live.anatomy, fold.prefix, fold.visible, fold.n)).items():
        for module in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
            values = kind.values(live.trunk.get_submodule(module))
            held |= {f"{module}.{part}": value.detach().clone() for part, value in values.items()}
    return Fold(fold.prefix, held, fold.visible)


@contextlib.contextmanager
def installed(live: Live, eab: dict, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model with `tensors` in the parts that `eab` describes; taken out again at the end, weights untouched.

    They keep their own dtype, so that a float64 model can be compared exactly.
    """
    trunk = live.trunk
    configs = {id(m.config): m.config for m in (live.model, trunk)}.values()
    before = [(config, config._attn_implementation_internal) for config in configs]
    with install(live.model, eab, ADAPTERS.get(live.anatomy.model_type)):
        for name, tensor in tensors.items():
            held, _, part = name.rpartition(".")
            setattr(trunk.get_submodule(held), part, torch.nn.Parameter(tensor, requires_grad=False))
        for name in () if tensors else eab["sites"]:  # of no slots, but several processes compare what a model holds
            module: Any = trunk.get_submodule(name)
            if (beside := next(module.parameters(), None)) is not None and not beside.is_meta:
                module.attention_bias.to(beside.device)
        require_added(trunk)
        try:
            for config, _ in before:
                config._attn_implementation_internal = "eab"
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation


# ---- norms


def head_norm_config(anatomy: Anatomy, layers: Collection[int], per_head: bool, gated: bool) -> dict:
    """`config.head_norm` of a model whose heads are normed in `layers`, counted from 0."""
    return {
        "format": HEAD_NORM_FORMAT,
        "sites": {site.name: [site.heads, site.value_dim] for site in anatomy.sites if site.block in layers},
        "per_head": per_head,
        "gated": gated,
        "eps": EPS,
    }


def norm_shapes(head_norm: dict) -> dict[str, dict[str, tuple[int, ...]]]:
    """Site name -> the shape of each of its parameters."""
    return {
        site: {
            "weight": (heads, dim) if head_norm["per_head"] else (dim,),
            **({"gate": (heads,)} if head_norm["gated"] else {}),
        }
        for site, (heads, dim) in head_norm["sites"].items()
    }


def at_gate(head_norm: dict, norms: Norms, gate: float) -> tuple[dict, Norms]:
    """The same norms, gated, with `gate` in every head."""
    gated = {}
    for site, values in norms.items():
        weight, (heads, _) = values["weight"], head_norm["sites"][site]
        gated[site] = {"weight": weight, "gate": weight.new_full((heads,), gate)}
    return {**head_norm, "gated": True}, gated


@contextlib.contextmanager
def normed(live: Live, head_norm: dict, norms: Norms) -> Iterator[None]:
    """The model, in which slots are `installed` (none will do), with `norms` in place, described by `head_norm`.

    Taken out again at the end. The norms keep their own dtype.
    """
    trunk = live.trunk
    with install_norms(trunk, head_norm):
        for name, values in norms.items():
            module = trunk.get_submodule(name).head_norm
            for part, value in values.items():
                setattr(module, part, torch.nn.Parameter(value, requires_grad=False))
        require_added(trunk)
        yield


# ---- the seam


@contextlib.contextmanager
def on_the_seam(live: Live) -> Iterator[None]:
    """The original model so that `observing` sees its attention: with no slots, where its family needs an adapter."""
    trunk = live.trunk
    if live.anatomy.model_type not in ADAPTERS or getattr(trunk.config, "eab", None) is not None:
        yield
        return
    with installed(live, live.anatomy.eab(0, "as_prefix"), {}):
        yield
