"""Checkpoints of a tuning run: one safetensors file, replaced as a whole, from which it goes on exactly."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..checkpoint.disk import replacing
from ..endings.temporary import as_os_error
from ..errors import OutputError, SourceError

NAME = "tuning.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """Steps done, trained parameters, those of the best judgement, the optimiser's state, and the record so far."""

    step: int
    trained: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    optimiser: dict
    record: dict


class Store:
    """A directory for the checkpoints of one tuning run, which `identity` (plain JSON) tells from any other."""

    def __init__(self, directory: Path, identity: Mapping[str, object]) -> None:
        # By way of JSON, as it will be read again.
        self.path, self.identity = Path(directory) / NAME, json.loads(json.dumps(identity))

    def save(self, snapshot: Snapshot) -> None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in snapshot.optimiser["param_groups"]]
        tensors = {f"trained.{name}": tensor for name, tensor in snapshot.trained.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in snapshot.best.items()}
        for index, state in snapshot.optimiser["state"].items():
            tensors |= {f"optimiser.{index}.{key}": tensor for key, tensor in state.items()}
        words = {"identity": self.identity, "step": snapshot.step, "groups": groups, "record": snapshot.record}
        made = not self.path.parent.exists()
        try:
            self.path.parent.mkdir(exist_ok=True)
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            with replacing(self.path) as partial:
                save_file(on_cpu, partial, metadata={"surgery": json.dumps(words)})
        except (OSError, SafetensorError) as error:
            if made:
                with contextlib.suppress(OSError):
                    self.path.parent.rmdir()
            found = as_os_error(error)
            why = error if found is None else found.strerror
            raise OutputError(
                f"{self.path} cannot be written ({why}); free some space, or give another --tuning DIR."
            ) from error

    def load(self) -> Snapshot | None:
        """The last checkpoint, or None. SourceError for one of another run, or one that cannot be read."""
        if not self.path.exists():
            return None
        again = "remove it to begin anew, or give another --tuning DIR"
        try:
            with safe_open(self.path, framework="pt") as stream:
                words = json.loads((stream.metadata() or {})["surgery"])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise SourceError(f"{self.path} is no tuning checkpoint ({type(error).__name__}); {again}.") from error
        other = [key for key, value in self.identity.items() if words["identity"].get(key) != value]
        if other:
            raise SourceError(f"{self.path} is of another run (its {other[0]} differs); {again}.")
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _under(tensors, "optimiser").items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = tensor
        optimiser = {"state": states, "groups": words["groups"]}
        return Snapshot(words["step"], _under(tensors, "trained"), _under(tensors, "best"), optimiser, words["record"])


def _under(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def restore_optimiser(optimiser: torch.optim.Optimizer, saved: dict) -> None:
    """Put the state of a `Snapshot` back; parameters stand in the order in which the optimiser was given them."""
    current = optimiser.state_dict()
    groups = [
        {**group, "params": now["params"]} for group, now in zip(saved["groups"], current["param_groups"], strict=True)
    ]
    optimiser.load_state_dict({"state": saved["state"], "param_groups": groups})
