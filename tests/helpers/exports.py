"""An export without a checkpoint on disk: a model in memory with its fold, as engines take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from helpers.families import PREFIX
from helpers.pair import slots_of
from surgery.checkpoint.stage import Stage
from surgery.delivery import Engine
from surgery.delivery.base import Finished
from surgery.live.graft import Fold, fold
from surgery.live.model import Live


@dataclass
class InMemory:
    """What engines ask of a `Finished`. Its slots keep the model's dtype, so that float64 can be compared exactly."""

    live: Live
    folded: Fold
    root: Path = Path("OUT")
    name: str = "OUT"
    original: object = None

    slots = property(lambda self: slots_of(self.folded))
    operations = ("attention_bias",)

    @property
    def described(self) -> SimpleNamespace:
        said = self.live.anatomy.eab(len(PREFIX), self.folded.visible)
        eab = SimpleNamespace(prefix_ids=PREFIX, **{"mixers": {}, "indexers": {}, **said})
        return SimpleNamespace(anatomy=self.live.anatomy, eab=eab, head_norm=None, config={})

    @property
    def manifest(self) -> SimpleNamespace:
        return SimpleNamespace(source={"spec": "owner/name", "kind": "hub", "revision": "abc"}, files={}, tensors={})

    require_slots_only = Finished.require_slots_only
    require_prefix_in_slots = Finished.require_prefix_in_slots


def in_memory(live: Live, visible: str = "as_prefix") -> InMemory:
    return InMemory(live, fold(live, PREFIX, visible))


def written(engine: Engine, finished: InMemory, out: Path) -> Path:
    """What `engine` writes of it, in the directory `out`."""
    engine.refuse(finished)
    with Stage(out) as stage:
        engine.write(finished, stage)
        stage.publish()
    return out


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest |delta log-probability| between two tensors of logits (B, T, V)."""
    return (a.log_softmax(-1) - b.log_softmax(-1)).abs().max().item()
