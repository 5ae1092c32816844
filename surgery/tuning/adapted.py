"""What is trained, and how it is switched off: PEFT around slots (trained in full) and, where asked for, LoRA.

The teacher is the same model with its adapter disabled: original weights, and the slots as they were folded, which is
the original behind its prefix, exactly. So there is no second model in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy
from ..errors import SourceError
from ..recipe import Lora
from ..verification.quantised import linears

ADAPTER = "default"
TRAINED = ("attention_bias",)  # modules at sites that an operation has put there


class Adapted:
    """`model`, which has what operations added in place, with all of it trainable and the rest frozen.

    `layers` are the linear layers inside its blocks by name, as they read their inputs: with LoRA around them, the
    module that adds it. Close it to have the model as it was, untrained.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, lora: Lora | None, seed: int) -> None:
        self.trunk, self.lora = model.get_submodule(anatomy.trunk), lora
        names = list(linears(model, anatomy))
        lead = f"{anatomy.trunk}." if anatomy.trunk else ""
        targets = DUMMY_TARGET_MODULES if lora is None else [lead + name for name in targeted(names, lora)]
        rank = {} if lora is None else {"r": lora.rank, "lora_alpha": lora.rank * lora.scale}
        model.requires_grad_(False)
        config = LoraConfig(
            target_modules=targets, modules_to_save=list(TRAINED), bias="none", task_type="CAUSAL_LM", **rank
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # half of LoRA begins at random
            self.peft: PeftModel = get_peft_model(model, config, adapter_name=ADAPTER)
        self.layers = {name: self.trunk.get_submodule(name) for name in names}

    def added(self) -> list[nn.Parameter]:
        """Parameters of what operations added."""
        return [p for name, p in self.peft.named_parameters() if p.requires_grad and ".lora_" not in name]

    def low_rank(self) -> list[nn.Parameter]:
        return [p for name, p in self.peft.named_parameters() if p.requires_grad and ".lora_" in name]

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all trained parameters, by their names in the PEFT model."""
        return {name: p.detach().clone() for name, p in self.peft.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.peft.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])

    @contextlib.contextmanager
    def merged(self) -> Iterator[dict[str, torch.Tensor]]:
        """The model with LoRA merged into its linear layers, as it will be emitted; the weights that differ, by name.

        Adapters are put aside rather than merged and subtracted again, which would leave rounding behind.
        """
        changed: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as undo, torch.no_grad():
            for name, layer in self.layers.items():
                if isinstance(layer, LoraLayer):
                    base = layer.get_base_layer()
                    before = base.weight.data
                    base.weight.data = before + layer.get_delta_weight(ADAPTER).to(before)
                    undo.callback(setattr, base.weight, "data", before)
                    _put(self.trunk, name, base)
                    undo.callback(_put, self.trunk, name, layer)
                    changed[f"{name}.weight"] = base.weight.data
            yield changed

    def save(self, directory: Path) -> None:
        """As a PEFT adapter of the folded, untuned model."""
        self.peft.save_pretrained(str(directory), safe_serialization=True)

    def close(self) -> None:
        self.peft.unload()


def targeted(names: list[str], lora: Lora) -> list[str]:
    """Of the linear layers `names`, those that `lora.targets` means; SourceError for a target that means none."""
    if lora.targets == "all":
        return names
    for target in lora.targets:
        if not any(_means(target, name) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise SourceError(f"tune.lora.targets: {target!r} is no linear layer of this model; it has {known}.")
    return [name for name in names if any(_means(target, name) for target in lora.targets)]


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _put(trunk: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(trunk.get_submodule(parent), child, module)
