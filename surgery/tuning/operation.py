"""`tune:` train what the operations added; the last operation of a recipe, though it has a key of its own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from ..anatomy.linears import linears, require_known
from ..anatomy.stored import stored_name
from ..converted.card import Section
from ..live.loading import require_in_memory
from ..live.model import Live
from ..live.quantised import loaded_linears
from ..operations.base import Changes, Exact, Fitting, Operation, Stand, Target
from ..table import Table
from .settings import Settings
from .words import tuned, tuning_sentence, tuning_table


class Tune(Settings, Operation):
    """Train what the operations added, on `dataset` or else on the calibration text, or images.

    A step reads its batch, over all processes, in `accumulate` micro-batches. Judged is, on the first `held_out` chunks
    of that text, the model as it would be emitted, quantised if `quantised` names a scheme; training stops after
    `patience` judgements without a better one. The gate of head norms rises from 0 to that of the recipe over the share
    `anneal` of the steps; one of 0 is learned.

    An encoder is judged on the last `held_out` images, by how far their features are from the original's, and trained
    on all others. `length` means nothing to images.
    """

    name: ClassVar[str] = "tune"
    key: ClassVar[str | None] = "tuning"

    @property
    def exact(self) -> Exact:
        return "no"

    @property
    def changes_weights(self) -> bool:
        return self.lora is not None

    @property
    def reads(self) -> str | None:
        return "tune trains" if self.dataset is None else None

    @property
    def repeats(self) -> bool:
        return False  # a data set is text too

    def plan(self, target: Target, parts: Any = None) -> Changes:
        """UnsupportedModel where LoRA is to change what the checkpoint stores in another form than the model has it."""
        anatomy = target.anatomy
        names = list(linears(anatomy.blank, anatomy)) if self.reads_linears else []
        require_known(self.per_token, names, "tune.per_token")
        merged = [] if self.lora is None else self.lora.targeted(names)
        stored = [stored_name(target.layout, anatomy, f"{anatomy.lead}{name}.weight") for name in merged]
        lora = None if self.lora is None else {"rank": self.lora.rank, "layers": len(merged)}
        return Changes(changed=dict.fromkeys(stored, "changed"), told={"tune": {"steps": self.steps, "lora": lora}})

    @property
    def whole(self) -> bool:
        return True

    def require(self, live: Live) -> None:
        if self.reads_linears:
            loaded_linears(live)  # weights that are offloaded
        require_in_memory(live.model, "tune")

    def fit(self, live: Live, text: Fitting) -> Any:
        from .tune import train  # PEFT and accelerate take seconds to import, and a plan needs neither

        return train(live, self, text)

    def graft(self, live: Live, parts: Any) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def tensors(self, live: Live, parts: Any) -> Mapping[str, torch.Tensor]:
        return parts.weights

    def remembered(self, parts: Any) -> Any:
        return dataclasses.replace(parts, weights={})

    def found(self, parts: Any, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        return {"tuning": parts.record.to_dict()}

    def says(self, parts: Any, target: Target, recipe: Stand) -> Section:
        trained = [part.called for part in recipe.trains]
        return Section(text=tuned(self, trained, parts.merged, parts.record.to_dict()))

    @classmethod
    def table(cls, verdict: Mapping[str, Any]) -> Table | None:
        return tuning_table(verdict.get("tuning"))

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        return tuning_sentence(verdict.get("tuning"))
