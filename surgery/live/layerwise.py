"""A model larger than memory: its weights come from its files when they are called for, one unit at a time.

A *unit* is what is loaded and let go together: a block, or the embedding, or the output layer. Whoever calls a module
of a unit finds its weights there, and those of another unit gone: every way of using the model is right. Passes over
text go through `together`, where many forwards share each load.

Nothing here knows a family. transformers builds the model and names its tensors, and converts them (renames, fused
experts) for each unit as it would for all of them, so that weights are the same to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..anatomy.packed import PackedForm, Unpack, packed_forms
from ..anatomy.quiet import quiet
from ..checkpoint.layout import Layout
from ..checkpoint.reading import read_tensors
from ..errors import DamagedCheckpoint, UnsupportedModel


@dataclass(frozen=True, eq=False)
class Unit:
    """What is loaded together. `gates`: modules whose call asks for it. `tensors`: names in the checkpoint.

    `homes`: name of a module, name of a parameter or buffer in it, and what stands there while it is not loaded.
    `stored`, `loaded`: bytes in the file, and in memory.
    """

    name: str
    gates: tuple[str, ...]
    tensors: tuple[str, ...]
    homes: tuple[tuple[str, str, torch.Tensor], ...]
    stored: int
    loaded: int


class Layerwise:
    """The units of a model, and which of them is loaded.

    `pinned` units stay once they are loaded; of the others there is one at a time. `bytes_read` counts what came from
    the files.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, config: LoadStateDictConfig, units: Sequence[Unit]):
        self.model, self.layout, self.units = model, layout, tuple(units)
        # Without "disk" somewhere, transformers would read all tensors of a unit in threads before it joins the first.
        self.config = dataclasses.replace(
            config, device_map={**(config.device_map or {"": torch.device("cpu")}), "<none>": "disk"}
        )
        self.pinned: set[Unit] = set()
        self._unpack: Unpack | None = None
        self._forms: dict[str, PackedForm] = {}  # of modules that come packed, by name
        self.aside = 0  # bytes of hidden states that may wait in memory
        self.bytes_read = 0
        self.order = {gate: place for place, gate in enumerate(_in_order(model, self.units))}
        self._unit_of = {gate: unit for unit in self.units for gate in unit.gates}
        self._loaded: set[Unit] = set()
        self._sound: set[Unit] = set()
        self._twins: list[PreTrainedModel] = []
        self._changes: list[Callable[[nn.Module], None]] = []
        self._ahead: tuple[Unit, Future[dict[str, torch.Tensor]]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        # Set by `together`: called by who comes to a gate.
        self.waiting: Callable[[str, torch.Tensor | None], None] | None = None
        for gate in self.order:
            self._watch(model, gate)

    @property
    def device(self) -> torch.device:
        """Where units are loaded to, and compute."""
        return torch.device(self.config.device_map[""])  # type: ignore[index]

    def __deepcopy__(self, memo: dict[int, Any]) -> Layerwise:
        return self  # a twin has the same units

    def pin(self, room: int) -> None:
        """Keep what is outside of all gates, and as many units as leave within `room` bytes what the others need."""
        changing = [unit for unit in self.units if unit.gates]
        ends = [unit for unit in changing if len(unit.gates) > 1 or unit is changing[-1]]  # read most often, if tied
        room -= sum(unit.loaded for unit in self.units if not unit.gates)
        room -= max(unit.loaded for unit in changing) + max(unit.stored for unit in changing)
        for unit in dict.fromkeys([*ends, *changing]):
            if unit.loaded <= room:
                self.pinned.add(unit)
                room -= unit.loaded
        for unit in self.units:
            if not unit.gates:
                self.pinned.add(unit)
                self._place(unit, self._read(unit))

    def unpacking(self, unpack: Unpack | None) -> None:
        """Have `unpack` unpack the modules of a unit when it comes, which is so once for the model and all its twins.

        Called before anything is loaded.
        """
        if unpack is not None:
            self._unpack, self._forms = unpack, packed_forms(self.model)

    # ---- weights

    def enter(self, gate: str, states: torch.Tensor | None) -> None:
        """Called at each gate, before its module computes on `states`."""
        if self.waiting is not None:
            self.waiting(gate, states)
        else:
            self.load(gate)

    def load(self, gate: str) -> None:
        """Have the unit of `gate` in place, and no other that is not pinned."""
        unit = self._unit_of[gate]
        for other in [*self._loaded]:
            if other is not unit and other not in self.pinned:
                self._drop(other)
        if unit not in self._loaded:
            self._place(unit, self._taken(unit))

    def release(self) -> None:
        """Let all units go but those that are pinned."""
        for unit in [*self._loaded]:
            if unit not in self.pinned:
                self._drop(unit)

    def read_ahead(self, gate: str) -> None:
        """Begin to read what `gate` will ask for, if nothing else is being read."""
        unit = self._unit_of[gate]
        if self._reader is not None and self._ahead is None and unit not in self._loaded:
            self._ahead = unit, self._reader.submit(self._read, unit)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block `read_ahead` reads, in a thread of its own."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as self._reader:
            try:
                yield
            finally:
                self._reader, self._ahead = None, None

    def _taken(self, unit: Unit) -> dict[str, torch.Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            found = ahead[1].result()  # of another unit it is let go: one is read at a time
            if ahead[0] is unit:
                return found
        return self._read(unit)

    def _read(self, unit: Unit) -> dict[str, torch.Tensor]:
        tensors = read_tensors(self.layout, unit.tensors)
        with self._lock:
            self.bytes_read += unit.stored
        return tensors

    def _place(self, unit: Unit, tensors: dict[str, torch.Tensor]) -> None:
        with quiet():
            convert_and_load_state_dict_in_model(self.model, tensors, self.config)
        self._loaded.add(unit)
        found: dict[int, torch.Tensor] = {}
        for module, name, empty in unit.homes:
            value = _held(self.model.get_submodule(module), name)
            if value is not empty:
                found[id(empty)] = value
        for module, name, empty in unit.homes:
            if id(empty) not in found:
                raise UnsupportedModel(
                    f"{self.model.config.model_type}: {module}.{name} is not made of the tensors of {unit.name} "
                    "alone, so this model cannot come layer by layer; give it more --memory."
                )
            self._require_finite(unit, f"{module}.{name}", found[id(empty)])
            for model in (self.model, *self._twins):
                _hold(model.get_submodule(module), name, found[id(empty)])
        self._sound.add(unit)
        self._unpacked(unit)
        for change in self._changes:
            self._changed(unit, change)

    def _unpacked(self, unit: Unit) -> None:
        if self._unpack is None:
            return
        for name in _modules(unit):
            module = self.model.get_submodule(name)
            self._unpack(module)
            if name in self._forms:
                for twin in self._twins:
                    PackedForm.of(module).give(twin.get_submodule(name))

    def _drop(self, unit: Unit) -> None:
        for module in _modules(unit):
            if module in self._forms:
                for model in (self.model, *self._twins):
                    self._forms[module].give(model.get_submodule(module))
        for module, name, empty in unit.homes:
            for model in (self.model, *self._twins):
                _hold(model.get_submodule(module), name, empty)
        self._loaded.discard(unit)

    def _require_finite(self, unit: Unit, name: str, tensor: torch.Tensor) -> None:
        if unit not in self._sound and tensor.is_floating_point() and not _is_finite(tensor):
            raise DamagedCheckpoint(
                f"{name} of {self.layout.root} holds NaN or Inf, so nothing computed from it would mean anything; "
                "restore it."
            )

    # ---- what stands beside the weights

    @contextlib.contextmanager
    def twin(self) -> Iterator[PreTrainedModel]:
        """The same model once more with the same weights, to be given other slots: both compute in one pass."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        twin = copy.deepcopy(self.model, shared)  # type: ignore[arg-type]
        self._twins.append(twin)
        try:
            yield twin
        finally:
            self._twins.remove(twin)

    @contextlib.contextmanager
    def changing(self, change: Callable[[nn.Module], None]) -> Iterator[None]:
        """Within the block, `change(module)` alters the weights of each module behind a gate when it is loaded.

        It may set `module.weight.data`, and no more: the weights as they are come back from the files.
        """
        self._forget()
        self._changes.append(change)
        try:
            yield
        finally:
            self._changes.remove(change)
            self._forget()

    def _forget(self) -> None:
        """Let all units go that come back when they are called for."""
        for unit in [*self._loaded]:
            if unit.gates:
                self._drop(unit)

    def _changed(self, unit: Unit, change: Callable[[nn.Module], None]) -> None:
        for module in _modules(unit):
            change(self.model.get_submodule(module))

    def _watch(self, model: PreTrainedModel, gate: str) -> None:
        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(states, torch.Tensor):
                states = None
            elif states.is_meta:  # it was moved to where a weight is that was not there
                raise UnsupportedModel(
                    f"{model.config.model_type}: {gate} is called with what has no values, so this model cannot come "
                    "layer by layer; give it more --memory."
                )
            self.enter(gate, states if states is not None and states.is_floating_point() else None)

        model.get_submodule(gate).register_forward_pre_hook(entering, prepend=True, with_kwargs=True)


def _in_order(model: PreTrainedModel, units: Sequence[Unit]) -> list[str]:
    """All gates, as a forward comes to them: blocks as they stand, the embedding before, the output layer after."""
    embedding = model.get_input_embeddings()
    gates = [gate for unit in units for gate in unit.gates]
    first = [gate for gate in gates if model.get_submodule(gate) is embedding]
    last = [gate for gate in gates if model.get_submodule(gate) is model.get_output_embeddings() and gate not in first]
    return [*first, *(gate for gate in gates if gate not in (*first, *last)), *last]


def _modules(unit: Unit) -> list[str]:
    """Names of the modules that hold its weights."""
    return list(dict.fromkeys(module for module, _, _ in unit.homes))


def _is_finite(tensor: torch.Tensor) -> bool:
    wide = tensor if tensor.itemsize > 1 else tensor.to(torch.bfloat16)  # of float8 torch does not say
    return bool(torch.isfinite(wide).all())


def _held(module: nn.Module, name: str) -> torch.Tensor:
    found: Any = module._parameters.get(name)
    return module._buffers[name] if found is None else found  # type: ignore[return-value]


def _hold(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    held[name] = tensor
