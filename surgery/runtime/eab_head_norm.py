"""Head-wise RMSNorm at run time: each head's output is normed before the output projection.

    o <- o + g (norm(o) - o),    norm(o) = o / sqrt(mean(o^2) + eps) * weight

over the dims of a head. At g = 0 the model is the one it was, exactly; at g = 1 the norm is pure, and has no gate.

`config.head_norm` describes what is installed: `sites` maps the name of each normed site in the trunk to
[heads, value_dim]; `per_head` says whether each head has a weight of its own or all share one; `gated` whether there
are gates; and `eps`. `eab_attention` calls the norm: it stands where attention does, in every family.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .eab_added import Added
from .eab_runtime import AttentionBiasMixin, find_trunk


class HeadNorm(Added):
    """The norm of one site: weight (E,), or (Hq, E) if it is `per_head`; gate (Hq,), or None where it is pure."""

    weight: nn.Parameter
    gate: nn.Parameter | None

    def __init__(self, heads: int, dim: int, per_head: bool, gated: bool, eps: float):
        super().__init__()
        self.heads, self.dim, self.eps = heads, dim, eps
        self.add_parameter("weight", *((heads, dim) if per_head else (dim,)))
        if gated:
            self.add_parameter("gate", heads)
        else:
            self.gate = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states (B, T, Hq, E) -> the same, normed, in their dtype; computed in float32 or wider."""
        if states.shape[2:] != (self.heads, self.dim):
            raise ValueError(
                f"attention gives {tuple(states.shape[2:])} heads and dims, and the norm is of {(self.heads, self.dim)}"
            )
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight
        if self.gate is not None:
            normed = torch.lerp(wide, normed, self.gate.to(normed.dtype)[:, None])  # exact at both ends
        return normed.to(states.dtype)


def install_norms(trunk: nn.Module, head_norm: dict[str, Any]) -> contextlib.ExitStack:
    """Put empty norms into the sites that `head_norm` names; closing what is returned takes them out again."""
    undo = contextlib.ExitStack()
    settings = (head_norm["per_head"], head_norm["gated"], head_norm["eps"])
    for name, (heads, dim) in head_norm["sites"].items():
        site = trunk.get_submodule(name)
        site.head_norm = HeadNorm(heads, dim, *settings)
        undo.callback(delattr, site, "head_norm")
    return undo


class HeadNormMixin(AttentionBiasMixin):
    """Mixed into a model class of transformers, it makes the class load and run with slots, if any, and head norms."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not any(
            isinstance(module, HeadNorm) for module in self.modules()
        ):  # AutoModel may have built the trunk with
            install_norms(find_trunk(self, config.eab["trunk"]), config.head_norm)
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | {"head_norm"}
