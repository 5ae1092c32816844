"""Slots: the keys and values of a prefix at every attention site."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ..anatomy.calls import Call, observing
from ..anatomy.sites import Anatomy
from ..errors import UnsupportedModel
from .base import Keep, Kind


class Slots(Kind):
    name = "slots"
    key = "sites"
    held = "attention_bias"

    def shapes(self, n: int, declared: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """key (n, kv_heads, key_dim), value (n, kv_heads, value_dim) of each site."""
        return {
            f"{site}.{self.held}.{part}": (n, kv_heads, dim)
            for site, (kv_heads, key_dim, value_dim) in declared.items()
            for part, dim in (("key", key_dim), ("value", value_dim))
        }

    def values(self, held: Any) -> dict[str, torch.Tensor]:
        return dict(zip(("key", "value"), held(), strict=True))

    def reading(self, anatomy: Anatomy, trunk: torch.nn.Module, keep: Keep) -> contextlib.AbstractContextManager[None]:
        names = {trunk.get_submodule(site.name): site.name for site in anatomy.sites}

        def attending(call: Call) -> None:
            if (name := names.get(call.module)) is None:
                kind = type(call.module).__name__
                raise UnsupportedModel(
                    f"{anatomy.model_type}: attention ran outside of the sites that were found ({kind})"
                )
            for part, states in (("key", call.key), ("value", call.value)):
                keep(f"{name}.{self.held}.{part}", states[0].transpose(0, 1).contiguous())

        return observing(attending)
