"""What `run` and `verify` do alike: measure the original and the converted model on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy
from ..live.likelihood import Score
from ..progress import Reporter
from ..recipe import Verify
from ..verification.gates.cache_edits import edit_passes, measure_edits
from ..verification.gates.measure import Measurement, Original, baseline_passes, measure, measure_original
from ..verification.gates.quantised import measure_quantised, quantised_passes
from ..verification.gates.streaming import KEPT, measure_streaming
from ..verification.gates.tasks import TaskSet


@dataclass(frozen=True)
class Measuring:
    """Text (N, T) to evaluate on, other text (M, T) to calibrate on, and the gates that say what else is measured."""

    anatomy: Anatomy
    evaluation: torch.Tensor
    calibrating: torch.Tensor | None
    gates: Verify
    reporter: Reporter
    tasks: TaskSet | None = None

    def original(self, model: PreTrainedModel, prefix: Sequence[int], tokenizer) -> Original:
        bos = tokenizer.bos_token_id
        self.reporter.step("measure the original")
        with self.reporter.bar("original", baseline_passes(prefix, bos) * len(self.evaluation)) as advance:
            found = measure_original(
                model, self.anatomy, self.evaluation, prefix, bos, lambda what, done: advance(done, what)
            )
        return replace(found, bare=self._further(model, found.bare, tokenizer, "the original", (0, KEPT)))

    def converted(self, model: PreTrainedModel, tokenizer) -> Measurement:
        self.reporter.step("measure the converted model")
        with self.reporter.bar("converted", len(self.evaluation)) as advance:
            found = measure(
                model, self.anatomy, self.evaluation, "converted", lambda what, done: advance(done, what), massive=True
            )
        return self._further(model, found, tokenizer, "the converted model", (0,))

    def _further(
        self, model: PreTrainedModel, found: Measurement, tokenizer, whose: str, keeps: Sequence[int]
    ) -> Measurement:  # fmt: skip
        if self.gates.quantised.gates():
            simulated, executed = self._quantised(model, whose)
            found = replace(found, quantised=simulated, executed=executed)
        if self.gates.streaming is not None:
            found = replace(found, streaming=self._streaming(model, self.gates.streaming.window, keeps, whose))
        if self.gates.cache_edits is not None:
            found = replace(found, edits=self._edits(model, self.gates.cache_edits.tokens, keeps, whose))
        if self.tasks is not None:
            self.reporter.step(f"measure {whose} on tasks")
            found = replace(found, tasks=self.tasks.measure(model, tokenizer))
        return found

    def _quantised(self, model: PreTrainedModel, whose: str) -> tuple[dict[str, Score], dict[str, Score]]:
        self.reporter.step(f"measure {whose} quantised")
        schemes, executed = tuple(self.gates.quantised.gates()), self.gates.quantised.executed()
        passes = quantised_passes(schemes, executed, self.evaluation, self.calibrating)
        with self.reporter.bar("quantised", passes) as advance:
            return measure_quantised(
                model, self.anatomy, schemes, executed, self.evaluation, self.calibrating,
                lambda what, done: advance(done, what),
            )  # fmt: skip

    def _streaming(
        self, model: PreTrainedModel, window: int, keeps: Sequence[int], whose: str
    ) -> dict[int, Score]:  # fmt: skip
        self.reporter.step(f"measure {whose} through a window of {window} tokens")
        with self.reporter.bar("streaming", len(keeps) * len(self.evaluation)) as advance:
            return measure_streaming(
                model, self.anatomy, self.evaluation, window, keeps, lambda what, done: advance(done, what)
            )

    def _edits(
        self, model: PreTrainedModel, tokens: int, keeps: Sequence[int], whose: str
    ) -> dict[tuple[str, int], Score]:  # fmt: skip
        self.reporter.step(f"measure {whose} behind a cache of which {tokens} tokens are edited")
        with self.reporter.bar("edited caches", edit_passes(keeps) * len(self.evaluation)) as advance:
            return measure_edits(
                model, self.anatomy, self.evaluation, tokens, keeps, lambda what, done: advance(done, what)
            )
