"""What is trained, and how it is switched off: PEFT around slots (trained in full) and, where asked for, LoRA.

The teacher is the same model with its adapter disabled: original weights, and the slots as they were folded, which is
the original after its prefix, exactly. Slots of an encoder are estimates: its teacher has none, and all of its tokens.
So there is no second model in memory.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..anatomy.linears import linears
from ..anatomy.sites import TRAINED
from ..live.as_it_came import as_it_came
from ..live.model import Live
from .settings import Settings

ADAPTER = "default"
Stored = Callable[[str, torch.Tensor], torch.Tensor]  # name in the causal LM, weight -> the weight, as if stored


def as_is(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


class Adapted:
    """A model, which has what operations added in place, with all of it trainable and the rest frozen.

    `layers` are the linear layers inside its blocks by name, as they read their inputs: with LoRA around them, the
    module that adds it. `gate`: what the gates of head norms shall be in the end; 0 lets them be learned, from 0.
    Close it to have the model without adapters; slots and norms stay as they were trained.
    """

    def __init__(self, live: Live, settings: Settings, gate: float, stored: Stored = as_is) -> None:
        model, anatomy, lora = live.model, live.anatomy, settings.lora
        self.live, self.trunk, self.lead, self.gate, self.stored = live, live.trunk, anatomy.lead, gate, stored
        names = list(linears(model, anatomy)) if lora is not None or settings.quantised is not None else []
        targets = DUMMY_TARGET_MODULES if lora is None else [self.lead + name for name in lora.targeted(names)]
        held = (name for name, part in self.trunk.named_modules() if next(part.parameters(), None) is not None)
        added = {name.rpartition(".")[2] for name in held} & set(TRAINED)
        rank: dict[str, Any] = {} if lora is None else {"r": lora.rank, "lora_alpha": lora.rank * lora.scale}
        model.requires_grad_(False)
        task = "CAUSAL_LM" if live.port.predicts else None  # PEFT has none whose model is given pixels
        config = LoraConfig(
            target_modules=targets, modules_to_save=sorted(added) or None, bias="none", task_type=task, **rank
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that it will lose
            torch.manual_seed(settings.seed)  # half of LoRA begins at random
            self.peft: PeftModel = get_peft_model(model, config, adapter_name=ADAPTER)
        self.layers = {name: self.trunk.get_submodule(name) for name in names}
        sites = [site.name for site in anatomy.sites if hasattr(self.trunk.get_submodule(site.name), "head_norm")]
        norms: list[Any] = [self.trunk.get_submodule(f"{site}.head_norm") for site in sites]
        self.gates: list[nn.Parameter] = [norm.modules_to_save[ADAPTER].gate for norm in norms]
        if gate:
            for parameter in self.gates:
                parameter.requires_grad_(False)
        # Kept by name: whoever disables adapters and enables them again has PEFT open all of them to gradients.
        self.trained = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def set_gate(self, share: float) -> None:
        """Open the gates that are not learned to this share of what they shall be."""
        for parameter in self.gates if self.gate else ():
            parameter.fill_(self.gate * share)

    @contextlib.contextmanager
    def teaching(self) -> Iterator[None]:
        """The model as the teacher."""
        with self.peft.disable_adapter(), contextlib.ExitStack() as undo:
            if self.live.anatomy.sees_all:  # of others slots are the prefix that the original is after
                undo.enter_context(as_it_came(self.live))
            yield

    def added(self) -> list[nn.Parameter]:
        """Parameters of what operations added."""
        return [parameter for name, parameter in self.trained.items() if ".lora_" not in name]

    def low_rank(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.trained.items() if ".lora_" in name]

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all trained parameters, by their names in the PEFT model."""
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name in the causal LM -> weight with LoRA merged into it, as it will be stored, one at a time."""
        for name, layer in self._low_rank_layers():
            yield f"{self.lead}{name}.weight", self._merged(name, layer)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """The model with LoRA merged into its linear layers, as it will be emitted.

        Original weights are put aside in main memory, rather than found again by subtraction, which would leave
        rounding behind.
        """
        with contextlib.ExitStack() as undo, torch.no_grad():
            for name, layer in self._low_rank_layers():
                base, merged = layer.get_base_layer(), self._merged(name, layer)
                undo.callback(base.weight.data.copy_, base.weight.data.to("cpu", copy=True))
                base.weight.data.copy_(merged)
                _put(self.trunk, name, base)
                undo.callback(_put, self.trunk, name, layer)
            yield

    def _low_rank_layers(self) -> Iterator[tuple[str, Any]]:
        return ((name, layer) for name, layer in self.layers.items() if isinstance(layer, LoraLayer))

    def _merged(self, name: str, layer: Any) -> torch.Tensor:
        before = layer.get_base_layer().weight.data
        return self.stored(f"{self.lead}{name}.weight", before + layer.get_delta_weight(ADAPTER).to(before)).to(before)

    def save(self, directory: Path, base: str) -> None:
        """As a PEFT adapter of the folded, untuned model, which it calls `base`, not by the path it was loaded from."""
        model: Any = self.peft.get_base_model()
        loaded_from = model.name_or_path, model.config._name_or_path
        model.name_or_path = model.config._name_or_path = base
        self.peft.peft_config[ADAPTER].base_model_name_or_path = base
        try:
            # It would look for the vocabulary's size where `base` is; no embedding is ever trained.
            self.peft.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
        finally:
            model.name_or_path, model.config._name_or_path = loaded_from

    def close(self) -> None:
        self.peft.unload()


def _put(trunk: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(trunk.get_submodule(parent), child, module)
