"""What `run` and `verify` do alike: measure the original and the converted model on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy
from ..reporting import Reporter
from ..verification.measure import Measurement, Original, baseline_passes, measure, measure_original
from ..verification.quantised import measure_quantised, quantised_passes


@dataclass(frozen=True)
class Measuring:
    """Text (N, T) to evaluate on, other text (M, T) to calibrate on, and the names of quantisation schemes to try."""

    anatomy: Anatomy
    evaluation: torch.Tensor
    calibrating: torch.Tensor | None
    schemes: Sequence[str]
    reporter: Reporter

    def original(self, model: PreTrainedModel, prefix: Sequence[int], bos: int | None) -> Original:
        self.reporter.step("measure the original")
        with self.reporter.bar("original", baseline_passes(prefix, bos) * len(self.evaluation)) as advance:
            found = measure_original(
                model, self.anatomy, self.evaluation, prefix, bos, lambda what, done: advance(done, what)
            )
        return replace(found, bare=self._quantised(model, found.bare, "the original"))

    def converted(self, model: PreTrainedModel) -> Measurement:
        self.reporter.step("measure the converted model")
        with self.reporter.bar("converted", len(self.evaluation)) as advance:
            found = measure(
                model, self.anatomy, self.evaluation, "converted", lambda what, done: advance(done, what), massive=True
            )
        return self._quantised(model, found, "the converted model")

    def _quantised(self, model: PreTrainedModel, found: Measurement, whose: str) -> Measurement:
        if not self.schemes:
            return found
        self.reporter.step(f"measure {whose} quantised")
        with self.reporter.bar(
            "quantised", quantised_passes(self.schemes, self.evaluation, self.calibrating)
        ) as advance:
            scores = measure_quantised(
                model, self.anatomy, self.schemes, self.evaluation, self.calibrating,
                lambda what, done: advance(done, what),
            )  # fmt: skip
        return replace(found, quantised=scores)
