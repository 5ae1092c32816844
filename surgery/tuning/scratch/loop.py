"""The training loop: next-token prediction, measured on held-out text as it goes."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from ...errors import SourceError
from ...progress import Advance, unseen
from ..corpus import Corpus
from ..loop import BETAS, rate
from ..objectives import Pass, language_modelling
from .measure import measure
from .settings import Pretrain
from .variants import Variant

WEIGHT_DECAY = 0.1  # of matrices; biases, norms and slots are left alone


def train(
    variant: Variant,
    settings: Pretrain,
    corpus: Corpus,
    accelerator: Accelerator,
    advance: Advance = unseen,
) -> dict:
    """Train `variant` in place. `losses`: of each step, in nats per token; `measured`: see `measure`, from step 0 on.

    Each entry of `measured` has `step` and `loss`, the mean of the losses since the entry before (None at step 0).
    Raises SourceError for a loss or a gradient that is not a number.
    """
    optimiser = torch.optim.AdamW(_groups(variant.model), lr=settings.learning_rate, betas=BETAS)
    model, optimiser = accelerator.prepare(variant.model, optimiser)
    losses: list[float] = []
    measured = [{"step": 0, "loss": None, **measure(variant, corpus.held_out)}]
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate(settings, step)
        loss = text_loss(model, corpus.batch(step, settings.batch).to(accelerator.device), variant.lead)
        accelerator.backward(loss)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), settings.clip))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not math.isfinite(norm):
            what = "gradient" if math.isfinite(losses[-1]) else "loss"
            raise SourceError(
                f"the {what} of {variant.name} at step {step + 1} is not a number; lower pretrain.learning_rate, or "
                "raise pretrain.warmup."
            )
        optimiser.step()
        optimiser.zero_grad()
        done = step + 1
        if done % settings.evaluate_every == 0 or done == settings.steps:
            recent = losses[measured[-1]["step"] :]
            entry = {"step": done, "loss": math.fsum(recent) / len(recent)}
            measured.append({**entry, **measure(variant, corpus.held_out)})
        advance(1, f"{variant.name}: loss {losses[-1]:.3f}, held-out perplexity {measured[-1]['ppl']:.1f}")
    return {"losses": losses, "measured": measured}


def text_loss(model, tokens: torch.Tensor, lead: tuple[int, ...]) -> torch.Tensor:
    """Mean NLL of tokens 1..T-1 of each text (B, T), after `lead`; what leads is no target, nor is what follows it.

    So every variant learns from the same targets.
    """
    front = tokens.new_tensor(lead).expand(len(tokens), -1)
    logits = model(input_ids=torch.cat([front, tokens], dim=1), use_cache=False).logits
    return language_modelling(Pass(tokens, logits[:, len(lead) :]))


def _groups(model: torch.nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
