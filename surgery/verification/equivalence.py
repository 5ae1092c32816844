"""The check that nothing skips: random ids through original + prefix and converted model, before anything is written.

The original answers first (`take_control`); then the operations that claim to be exact are put into the same model, and
it has to give the same answers (`compare_random_ids`). Head norms are then at gate 0, where they leave the model what
it was, and a site that is normed in the wrong place or shape shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ..errors import SurgeryError, UnsupportedModel, brief, out_of_memory
from ..live.model import Live
from ..live.together import together

ROWS, TOKENS, PADDING = 2, 48, 5
FEWEST = 4  # tokens on which two models can still be told apart

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
        return asdict(self)


@dataclass(frozen=True)
class Control:
    """What the original answers after `prefix` to random `ids` (ROWS, T): log-probabilities (ROWS, T, V) for each way
    of feeding the text, and by how much rounding may change them."""

    prefix: tuple[int, ...]
    ids: torch.Tensor
    plain: torch.Tensor
    padded: torch.Tensor
    cached: torch.Tensor | None
    limit: float


@torch.inference_mode()
def take_control(live: Live, prefix: Sequence[int], comparable: Callable[[int], bool] = lambda length: True) -> Control:
    """What the unchanged model answers after `prefix`.

    `comparable`: whether the two are to be the same function on so many tokens, those of the prefix among them. Slots
    that are always visible differ beyond a window by design; the text is kept inside.
    """
    n, device = len(prefix), live.device
    length = _length(live, n, comparable)
    generator = torch.Generator().manual_seed(0)
    vocabulary = live.model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (ROWS, length), generator=generator).to(device)
    lead = torch.tensor(list(prefix), dtype=torch.long, device=device).expand(ROWS, -1)
    after = torch.cat([lead, ids], dim=1)
    with live.apart() as other:
        plain, eager, padded, cached = together(live.layers, [
            lambda: _log_probabilities(live, after, use_cache=False)[:, n:],
            lambda: _eager(other, after, n),
            lambda: _padded_control(live, after)[:, n:],
            lambda: _cached(live, after, n, numbered=True)[:, n:] if _has_cache(live) else None,
        ])  # fmt: skip
    assert plain is not None and padded is not None
    dtype = next(live.model.parameters()).dtype
    if live.anatomy.mixers and dtype == torch.float64:
        dtype = torch.float32  # as kernels of a state compute, whatever they are given
    floor, ceiling = BOUNDS.get(dtype, BOUNDS_HALF)
    noise = 0.0 if eager is None else _distance(eager, plain)
    limit = min(max(floor, NOISE_FACTOR * noise), ceiling)
    # Where the original breaks on padding, the control without it.
    padded = padded if bool(padded.isfinite().all()) else plain
    return Control(tuple(prefix), ids, plain, padded, cached, limit)


@torch.inference_mode()
def compare_random_ids(live: Live, control: Control) -> Equivalence:
    """The model with its operations in place against `control`. UnsupportedModel if they are not the same function."""
    kind, ids = live.anatomy.model_type, control.ids
    try:
        answers = together(live.layers, [
            lambda: _log_probabilities(live, ids, use_cache=False),
            # Without slots nothing derives positions: both are given them.
            lambda: _padded(live, ids) if control.prefix else _padded_control(live, ids),
            lambda: None if control.cached is None else _cached(live, ids, 0),
        ])  # fmt: skip
        plain, padded, cached = (
            None if answer is None or wanted is None else _distance(answer, wanted)
            for answer, wanted in zip(answers, (control.plain, control.padded, control.cached), strict=True)
        )
        assert plain is not None and padded is not None
    except SurgeryError:  # of the files that the weights come from
        raise
    except Exception as error:  # the runtime refuses a call, or foreign model code breaks on it: either way, no fold
        if out_of_memory(error):
            raise
        raise UnsupportedModel(f"{kind}: the converted model does not run ({brief(error)})") from error
    found = Equivalence(plain, padded, cached, control.limit)
    for how, value in (("", plain), (" under left padding", found.padded), (" with a key/value cache", cached)):
        if value is not None and not value <= control.limit:
            raise UnsupportedModel(
                f"{kind}: on random token ids the {'folded' if control.prefix else 'converted'} model differs from "
                f"{'original + prefix' if control.prefix else 'the original'} by {value:.3g} in log-probability"
                f"{how} (rounding explains {control.limit:.3g}), so it is not exact for this model and nothing was "
                "written"
            )
    return found


def _length(live: Live, n: int, comparable: Callable[[int], bool]) -> int:
    """How many random tokens a row has. UnsupportedModel where too few are left to compare the models on."""
    room = (live.anatomy.max_positions or 10**9) - n - 1
    length = max((length for length in range(TOKENS + 1) if length <= room and comparable(n + length)), default=0)
    if length < FEWEST:
        raise UnsupportedModel(
            f"{live.anatomy.model_type}: a prefix of {n} tokens leaves {length} positions to compare the models on"
        )
    return length


def _has_cache(live: Live) -> bool:
    return "past_key_values" in inspect.signature(live.model.forward).parameters


def _takes_positions(live: Live) -> bool:
    return "position_ids" in inspect.signature(live.model.forward).parameters


def _log_probabilities(live: Live, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    return live.model(input_ids=tokens, **kwargs).logits.float().log_softmax(-1)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _eager(live: Live, after: torch.Tensor, n: int) -> torch.Tensor | None:
    """What the unchanged model answers with eager attention, where its default is another: the size of rounding."""
    config = live.model.config
    before = config._attn_implementation
    if before == "eager":
        return None
    try:
        config._attn_implementation = "eager"
        return _log_probabilities(live, after, use_cache=False)[:, n:]
    finally:
        config._attn_implementation = before


def _padded(live: Live, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """The text after PADDING tokens that the attention mask hides."""
    padding = torch.zeros(ROWS, PADDING, dtype=torch.long, device=ids.device)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    padded = torch.cat([padding, ids], dim=1)
    return _log_probabilities(live, padded, attention_mask=mask, use_cache=False, **kwargs)[:, PADDING:]


def _padded_control(live: Live, after: torch.Tensor) -> torch.Tensor:
    """Original + prefix after padding: a model may count it (llama4's temperature), and folded it must do so too."""
    positions = {}
    if _takes_positions(live):
        counted = torch.arange(-PADDING, after.shape[1], device=after.device).clamp(min=0)
        positions = {"position_ids": counted.expand(ROWS, -1)}
    return _padded(live, after, **positions)


def _cached(live: Live, ids: torch.Tensor, lead: int, numbered: bool = False) -> torch.Tensor:
    """The text in three pieces through a growing cache, `lead` tokens more in the first, one token in the last.

    `numbered`: positions are given, as `generate` gives them: some originals count wrong from their cache (Bamba). Some
    forget a state between pieces of more than one token (Jamba), so the two are compared on the same pieces.
    """
    length = ids.shape[1] - lead
    numbered = numbered and _takes_positions(live)
    cuts, cache, parts = (0, lead + length // 2, ids.shape[1] - 1, ids.shape[1]), None, []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        places = {"position_ids": torch.arange(start, stop, device=ids.device).expand(ROWS, -1)} if numbered else {}
        out = live.model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **places)
        cache = out.past_key_values
        parts.append(out.logits.float().log_softmax(-1))
    return torch.cat(parts, dim=1)
