"""Where in a live model things are: layers of its residual stream, down projections, sites with slots or norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..anatomy.linears import widths
from ..anatomy.sound import norm_after
from ..runtime.eab_registers import MARK as REGISTERS
from ..runtime.eab_registers import with_token, without_token
from .model import Live


def down_projections(live: Live) -> dict[int, nn.Module]:
    """Block -> the module that projects its MLP's activations down to the residual stream.

    By shape and place: inside the block, outside of sites and mixers, from a wider space to the hidden size. A block
    with none or with several (two MLPs), or with experts, whatever stands beside them, is left out: which unit is meant
    would not be known.
    """
    trunk = live.trunk
    width = trunk.config.get_text_config().hidden_size
    names = [site.name for site in live.anatomy.sites] + [mixer.name for mixer in live.anatomy.mixers]
    apart = tuple(f"{name}." for name in names)
    found = {}
    for index, name in enumerate(live.anatomy.blocks):
        outside = [
            (path, module)
            for path, module in trunk.get_submodule(name).named_modules(prefix=name)
            if not f"{path}.".startswith(apart)
        ]
        inside = [module for _, module in outside if widths(module)[1] == width and widths(module)[0] > width]
        if len(inside) == 1 and not any(path.endswith(".experts") for path, _ in outside):
            found[index] = inside[0]
    return found


def name_in(live: Live, module: nn.Module) -> str:
    """The name of a module within the trunk."""
    return next(name for name, one in live.trunk.named_modules() if one is module)


def slot_count(live: Live) -> int:
    """How many slots each site has; 0 in an unchanged model."""
    return (getattr(live.trunk.config, "eab", None) or {}).get("n_slots", 0)


def normed_sites(live: Live) -> int:
    """How many sites norm their heads' outputs."""
    return sum(hasattr(live.trunk.get_submodule(site.name), "head_norm") for site in live.anatomy.sites)


def on_layer(
    live: Live, layer: int, look: Callable[[torch.Tensor], torch.Tensor | None], *, first: bool = False
) -> RemovableHandle:
    """Show `look` the stream (B, T, d) at `layer` whenever it passes; what it returns, if anything, goes on instead.

    With `first`, in front of whatever already looks there. Gemma 3n carries several streams side by side, (K, B, T, d):
    shown is the one that its blocks read. Those of hyper-connections (HY V4), (B, T, K, d), are shown as one, K d wide.
    """
    trunk, blocks = live.trunk, live.anatomy.blocks
    active = getattr(trunk.config.get_text_config(), "altup_active_idx", None)

    def shown(states: torch.Tensor) -> torch.Tensor | None:
        if (register := getattr(trunk, REGISTERS, None)) is not None:  # of test time: it is inside of the blocks alone
            token = register.tokens[layer] if layer else torch.zeros_like(states[:, :1])
            changed = look(with_token(states, register.at, token))
            if changed is None:
                return None
            changed, register.tokens[layer] = without_token(changed, register.at)
            return changed
        if states.ndim == 4 and active is None:
            changed = look(states.flatten(2))
            return None if changed is None else changed.view(states.shape)
        changed = look(states if active is None else states[active])
        if changed is None or active is None:
            return changed
        states = states.clone()
        states[active] = changed
        return states

    def leaving(block, args, output):
        several = isinstance(output, (tuple, list))  # OpenAI GPT gives a list
        changed = shown(output[0] if several else output)
        return changed if changed is None or not several else type(output)((changed, *output[1:]))

    def entering(block, args, kwargs):
        changed = shown(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    if layer:
        return trunk.get_submodule(blocks[layer - 1]).register_forward_hook(leaving, prepend=first)
    return trunk.get_submodule(blocks[0]).register_forward_pre_hook(entering, with_kwargs=True, prepend=first)


def final_norm(live: Live) -> nn.Module | None:
    """The norm between the last block and the output layer: the one that stands after the blocks in the trunk. Encoders
    of sound keep theirs beside the blocks, in any order: there, the one that is given what the last block returns."""
    stacks = {name.split(".")[0] for name in live.anatomy.blocks}
    children = list(live.trunk.named_children())
    after = [i for i, (name, _) in enumerate(children) if name in stacks]
    norms = [child for _, child in children[max(after) + 1 :] if "norm" in type(child).__name__.lower()]
    if len(norms) == 1:
        return norms[0]
    if live.anatomy.patching is None or not live.anatomy.patching.is_sound:
        return None
    name = norm_after(live.anatomy)
    return None if name is None else live.trunk.get_submodule(name)
