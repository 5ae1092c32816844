"""The check that nothing skips: random ids through original + prefix and converted model, before anything is written.

Slots are as they will be written. Head norms are at gate 0, where they leave the model what it was, and a site that is
normed in the wrong place or shape shows.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..anatomy.sites import Anatomy
from ..anatomy.structure import brief
from ..errors import UnsupportedModel, out_of_memory
from ..live.graft import Norms, normed
from ..live.stream import input_device
from ..operations.attention_bias import Slots, grafted
from ..operations.head_norm import at_gate

ROWS, TOKENS, PADDING = 2, 48, 5

# Largest |delta log-probability| that rounding explains, as a multiple of what sdpa and eager attention of the original
# differ by, never less than the floor, nor more than the ceiling: a wrong mask, shift or missing slot is off by 0.1 and
# more, and eager attention of a live model can be another function (Falcon's, without its ALiBi).
NOISE_FACTOR = 30.0
BOUNDS = {torch.float64: (1e-4, 0.05), torch.float32: (2e-3, 0.05)}
BOUNDS_HALF = (0.1, 0.3)


@dataclass(frozen=True)
class Equivalence:
    """Largest |delta log-probability| over random ids, for each way of feeding the text, and the bound on it.

    `cached` is None for a model that has no key/value cache.
    """

    plain: float
    padded: float
    cached: float | None
    limit: float

    def to_dict(self) -> dict:
        return {"plain": self.plain, "padded": self.padded, "cached": self.cached, "limit": self.limit}


@torch.inference_mode()
def compare_random_ids(
    model: PreTrainedModel,
    anatomy: Anatomy,
    prefix: Sequence[int],
    slots: Slots,
    visible: str,
    head_norm: dict | None = None,
    norms: Norms | None = None,
) -> Equivalence:
    """Compare the converted model, live, against original + prefix. UnsupportedModel if they are not the same function.

    An empty prefix has no slots. `head_norm` and `norms` are what will be written; here their gates are 0.
    With slots that are always visible ("always"), the two differ beyond a window by design; the text is kept inside.
    """
    length = _length(model, anatomy, len(prefix), visible)
    device = input_device(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (ROWS, length), generator=generator).to(device)
    lead = torch.tensor(list(prefix), dtype=torch.long, device=device).expand(ROWS, -1)
    behind = torch.cat([lead, ids], dim=1)

    def log_probabilities(tokens, **kwargs):
        return model(input_ids=tokens, **kwargs).logits.float().log_softmax(-1)

    control = log_probabilities(behind, use_cache=False)[:, len(prefix) :]
    noise = _implementation_noise(model, behind, control, len(prefix), log_probabilities)
    floor, ceiling = BOUNDS.get(next(model.parameters()).dtype, BOUNDS_HALF)
    limit = min(max(floor, NOISE_FACTOR * noise), ceiling)
    padded_control = _padded_control(model, behind, control, log_probabilities)
    has_cache = "past_key_values" in inspect.signature(model.forward).parameters
    cached_control = _cached(model, behind, len(prefix))[:, len(prefix) :] if has_cache else None
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(grafted(model, anatomy, prefix, slots, visible))
            if head_norm is not None:
                stack.enter_context(normed(model, anatomy, *at_gate(head_norm, norms, 0.0)))
            plain = _distance(log_probabilities(ids, use_cache=False), control)
            if prefix:
                behind_padding = _padded(ids, log_probabilities)
            else:  # nothing derives positions: both are given them
                behind_padding = _padded_control(model, ids, control, log_probabilities)
            padded = _distance(behind_padding, padded_control)
            cached = _distance(_cached(model, ids, 0), cached_control) if has_cache else None
    except Exception as error:  # the runtime refuses a call, or foreign model code breaks on it: either way, no fold
        if out_of_memory(error):
            raise
        raise UnsupportedModel(f"{anatomy.model_type}: the converted model does not run ({brief(error)})") from error
    found = Equivalence(plain, padded, cached, limit)
    for how, value in (("", plain), (" under left padding", padded), (" with a key/value cache", cached)):
        if value is not None and not value <= limit:
            raise UnsupportedModel(
                f"{anatomy.model_type}: on random token ids the {'folded' if prefix else 'normed'} model differs from "
                f"{'original + prefix' if prefix else 'the original, at gate 0,'} by {value:.3g} in log-probability"
                f"{how} (rounding explains {limit:.3g}), so it is not exact for this model and nothing was written"
            )
    return found


def _length(model, anatomy: Anatomy, n: int, visible: str) -> int:
    room = (anatomy.max_positions or 10**9) - n - 1
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if visible == "always" and window:
        room = min(room, window - n)
    length = min(TOKENS, room)
    if length < 4:
        raise UnsupportedModel(
            f"{anatomy.model_type}: a prefix of {n} tokens leaves {length} positions to compare the models on"
        )
    return length


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _implementation_noise(model, behind, control, n: int, log_probabilities) -> float:
    """How far eager attention of the unchanged model is from its default: the size of rounding in this model."""
    config = model.config
    before = config._attn_implementation
    if before == "eager":
        return 0.0
    try:
        config._attn_implementation = "eager"
        return _distance(log_probabilities(behind, use_cache=False)[:, n:], control)
    finally:
        config._attn_implementation = before


def _padded(ids: torch.Tensor, log_probabilities, **kwargs) -> torch.Tensor:
    """The text behind PADDING tokens that the attention mask hides."""
    padding = torch.zeros(ROWS, PADDING, dtype=torch.long, device=ids.device)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    padded = torch.cat([padding, ids], dim=1)
    return log_probabilities(padded, attention_mask=mask, use_cache=False, **kwargs)[:, PADDING:]


def _padded_control(model, behind, control, log_probabilities) -> torch.Tensor:
    """Original + prefix behind padding: a model may count padding (llama4's temperature), and folded it must do so too.

    Where the original breaks on padding, the control without it.
    """
    positions = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        counted = torch.arange(-PADDING, behind.shape[1], device=behind.device).clamp(min=0)
        positions = {"position_ids": counted.expand(ROWS, -1)}
    padded = _padded(behind, log_probabilities, **positions)[:, -control.shape[1] :]
    return padded if bool(padded.isfinite().all()) else control


def _cached(model, ids: torch.Tensor, lead: int) -> torch.Tensor:
    """The text in three pieces through a growing cache, `lead` tokens more in the first, one token in the last."""
    length = ids.shape[1] - lead
    cuts, cache, parts = (0, lead + length // 2, ids.shape[1] - 1, ids.shape[1]), None, []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits.float().log_softmax(-1))
    return torch.cat(parts, dim=1)
