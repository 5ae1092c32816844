"""The training loop: judged on what was held out, the best kept, stopped by the first loss that is not a number."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..live.features import Features, features_of
from ..live.model import Live
from ..live.places import final_norm, on_layer
from ..live.port import Images
from ..progress import Advance, unseen
from ..recipe.training import Training
from ..words import factor
from .adapted import Adapted
from .corpus import Corpus
from .fake_quant import fake_quantised
from .judging import held_out_distance, held_out_nll, original_features
from .objectives import Objective, Pass
from .settings import Settings
from .store import Snapshot, Store, restore_optimiser

BETAS = (0.9, 0.95)


@dataclass
class Record:
    """What happened: `losses` by step with each objective's value, `judged` by step, on what was held out: "nll" of
    text, in nats per token, or "distance" of an encoder's features of images from the original's."""

    losses: list[dict] = field(default_factory=list)
    judged: list[dict] = field(default_factory=list)
    stopped: str | None = None

    @property
    def best(self) -> dict:
        return min(self.judged, key=judgement)

    def to_dict(self) -> dict:
        """`tuning` of the verdict."""
        judged = [{**entry, **({"ppl": factor(entry["nll"])} if "nll" in entry else {})} for entry in self.judged]
        return {"best_step": self.best["step"], "held_out": judged, "losses": self.losses, "stopped": self.stopped}


def judgement(entry: dict) -> float:
    """Of an entry of `judged`, what is the better the lower it is."""
    return entry["nll"] if "nll" in entry else entry["distance"]


class Loop:
    """Train what `adapted` says, by `settings`, on `corpus`; on any number of processes, the same steps.

    live: the model inside `adapted`, with what operations added in place.
    advance: told how many steps are done since the last call, and what to show.
    """

    def __init__(
        self,
        live: Live,
        adapted: Adapted,
        settings: Settings,
        corpus: Corpus,
        accelerator: Accelerator,
        store: Store | None = None,
        advance: Advance = unseen,
    ) -> None:
        self.live, self.adapted, self.settings, self.corpus = live, adapted, settings, corpus
        self.accelerator, self.store, self.advance = accelerator, store, advance
        self.objective = Objective(settings.objectives.weights())
        groups = [{"params": adapted.added(), "base": settings.learning_rate}]
        if settings.lora is not None:
            groups.append({"params": adapted.low_rank(), "base": settings.lora.learning_rate})
        optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, weight_decay=0.0)
        self.trained, self.optimiser = accelerator.prepare(adapted.peft, optimiser)
        self.record, self.best = Record(), adapted.state()
        self.on = "text" if live.port.predicts else "inputs"
        self.norm = (None if live.port.predicts else final_norm(live)) or torch.nn.Identity()
        self.original: Features | None = None  # what an encoder's features of the held-out images are to be

    def run(self) -> Record:
        """Train, and leave the best state that was judged in place."""
        first = self._resume()
        if first == 0:
            self._judge(0)
        for step in range(first, self.settings.steps):
            if self.record.stopped:
                break
            self._step(step)
            done = step + 1
            if not self.record.stopped and (done % self.settings.evaluate_every == 0 or done == self.settings.steps):
                self._judge(done)
                self._save(done)
        self.adapted.load_state(self.best)
        self.adapted.set_gate(1.0)
        return self.record

    # ---- one step

    def _step(self, step: int) -> None:
        settings, accelerator = self.settings, self.accelerator
        self.adapted.set_gate(min(1.0, (step + 1) / max(1.0, settings.anneal * settings.steps)))
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * rate(settings, step)
        rows = self.corpus.batch(step, settings.batch)
        mine = rows.chunk(accelerator.num_processes)[accelerator.process_index]
        pieces = mine.chunk(settings.accumulate)
        total: Any = 0.0
        parts: dict[str, float] = {}
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.trained):
                loss, found = self._loss(piece.to(self.live.device))
                accelerator.backward(loss / len(pieces))
            total = total + loss.detach() / len(pieces)
            parts = {name: parts.get(name, 0.0) + value / len(pieces) for name, value in found.items()}
        norm = accelerator.clip_grad_norm_([p for g in self.optimiser.param_groups for p in g["params"]], settings.clip)
        mean = accelerator.reduce(total, "mean").item()
        if not math.isfinite(mean) or not math.isfinite(float(norm)):
            self.record.stopped = (
                f"the {'gradient' if math.isfinite(mean) else 'loss'} of step {step + 1} is not a number; kept is the "
                f"state of step {self.record.best['step']}. A lower tune.learning_rate may help"
            )
        else:
            self.optimiser.step()
            shown = parts if len(parts) > 1 else {}
            means = {name: accelerator.reduce(total.new_tensor(value), "mean").item() for name, value in shown.items()}
            self.record.losses.append({"step": step + 1, "loss": mean, **means})
        self.optimiser.zero_grad()
        held_out = judgement(self.record.judged[-1])
        judged = f"perplexity {factor(held_out):.2f}" if self.live.port.predicts else f"distance {held_out:.6f}"
        self.advance(1, f"loss {mean:.4f}, held-out {judged}")

    def _loss(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        teacher = None
        if self.objective.needs_teacher:
            with torch.no_grad(), self.adapted.teaching():
                teacher = self._pass(self.adapted.peft, tokens)
        rounding: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if (scheme := self.settings.scheme) is not None:
            rounding = fake_quantised(self.adapted.layers, scheme, len(tokens))
        with rounding:
            return self.objective(self._pass(self.trained, tokens), teacher)

    def _pass(self, model, tokens: torch.Tensor) -> Pass:
        half, port = self.settings.precision == "bfloat16", self.live.port
        with self._layers() as hidden, torch.autocast(tokens.device.type, torch.bfloat16, enabled=half):
            if not isinstance(port, Images):
                return Pass(tokens, model(input_ids=tokens, use_cache=False).logits, hidden)
            self.live.trunk(**port.given(self.live, tokens))
            return Pass(tokens, None, hidden, [self.norm(part) for part in features_of(port, hidden[-1])])

    @contextlib.contextmanager
    def _layers(self) -> Iterator[list[torch.Tensor]]:
        """A list that fills with the residual stream of each layer that an objective reads; of an encoder always with
        that of the last, which features are made of."""
        seen: list[torch.Tensor] = []
        last = len(self.live.anatomy.blocks)
        read = range(last + 1) if self.objective.needs_hidden else () if self.live.port.predicts else (last,)
        with contextlib.ExitStack() as undo:
            for layer in read:
                undo.callback(on_layer(self.live, layer, seen.append).remove)
            yield seen

    # ---- what was held out

    def _judge(self, step: int) -> None:
        """Score the held-out text, or images, with the model as it would be emitted, and keep this state if it is the
        best."""
        self.adapted.set_gate(1.0)
        found: list[float | None] = [None]
        if self.accelerator.is_main_process:
            self.advance(0, f"held-out {self.on}, after step {step}")
            found = [self._held_out()]
        value: Any = broadcast_object_list(found)[0]
        if not math.isfinite(value) and step:
            self.record.stopped = (
                f"the model of step {step} gives no number on held-out {self.on}; kept is the best before"
            )
            return
        self.record.judged.append({"step": step, "nll" if self.live.port.predicts else "distance": value})
        if self.record.best["step"] == step:
            self.best = self.adapted.state()
        late = [entry for entry in self.record.judged if entry["step"] > self.record.best["step"]]
        if self.settings.patience is not None and len(late) >= self.settings.patience:
            self.record.stopped = f"no better on held-out {self.on} since step {self.record.best['step']}"

    def _held_out(self) -> float:
        judged = self.live, self.adapted, self.settings, self.corpus
        if self.live.port.predicts:
            return held_out_nll(*judged)
        if self.original is None:
            self.original = original_features(self.live, self.adapted, self.corpus)
        return held_out_distance(*judged, self.original)

    # ---- checkpoints

    def _save(self, step: int) -> None:
        if self.store is not None and self.accelerator.is_main_process:
            record = {**vars(self.record)}
            self.store.save(Snapshot(step, self.adapted.state(), self.best, self.optimiser.state_dict(), record))

    def _resume(self) -> int:
        snapshot = self.store.load() if self.store is not None and self.accelerator.is_main_process else None
        snapshot = broadcast_object_list([snapshot])[0]  # the others may have another disk
        if snapshot is None:
            return 0
        self.adapted.load_state(snapshot.trained)
        self.best = snapshot.best
        restore_optimiser(self.optimiser, snapshot.optimiser)
        self.record = Record(**snapshot.record)
        self.advance(snapshot.step, f"going on after step {snapshot.step}")
        return snapshot.step


def rate(settings: Training, step: int) -> float:
    """The factor on the learning rate at `step` (0, 1, ...): linear warm-up, then constant or half a cosine."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / max(1, settings.steps - settings.warmup)))
