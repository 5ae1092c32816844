"""Streaming through a window: what is hidden, and that a folded model needs no token kept."""

from __future__ import annotations

import pytest
import torch
from helpers.families import any_model
from helpers.measured import Told, subject
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text

from surgery.live.edits import TouchedNothing
from surgery.live.graft import fold, grafted
from surgery.verification.gates.streaming import KEPT, Streaming, evicting

PREFIX = [1, 5]


def visible(length: int, window: int, keep: int) -> torch.Tensor:
    """Written down place by place: query, key."""
    return torch.tensor([[k <= q and (q - k < window or k < keep) for k in range(length)] for q in range(length)])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("keep", [0, 3])
def test_a_query_sees_its_window_and_what_is_kept(keep: int, implementation: str) -> None:
    model, text = tiny_model("llama"), tiny_text(2, 20)
    model.set_attn_implementation(implementation)
    live = live_of(model)
    mask = torch.zeros(20, 20, dtype=torch.float64)
    mask = mask.masked_fill(~visible(20, 6, keep), torch.finfo(torch.float64).min).expand(2, 1, 20, 20)
    with one_thread(), torch.no_grad():
        expected = model(text, attention_mask=mask).logits
        with evicting(live, 6, keep):
            torch.testing.assert_close(model(text).logits, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "gemma2", "bloom", "falcon"])
def test_folded_and_keeping_nothing_is_the_prefix_kept(model_type: str) -> None:
    """The prefix as StreamingLLM's first tokens; where a layer has a window of its own, it hides them in both."""
    model, text = any_model(model_type), tiny_text(2, 30)
    live = live_of(model)
    behind = torch.cat([torch.tensor([PREFIX]).expand(2, -1), text], dim=1)
    with one_thread(), torch.no_grad():
        with evicting(live, 5, len(PREFIX)):
            expected = model(behind).logits[:, len(PREFIX) :]
        with grafted(live, fold(live, PREFIX, "as_prefix")):
            whole = model(text).logits
            with evicting(live, 5):
                found = model(text).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - whole).abs().max() > 1e-3


def test_every_number_of_kept_tokens_is_scored_on_the_same_text() -> None:
    model, text, told = tiny_model("llama"), tiny_text(3, 20), Told()
    live = live_of(model)
    with one_thread():
        gate = Streaming(window=6, max_ratio=1.0)
        found = gate.measure(subject(live, text, told), None)
        converted = gate.measure(subject(live, text, Told(), original=False), None)
        with torch.no_grad():
            logits = model(text).logits[:, :-1].log_softmax(-1)
    full = -logits.gather(-1, text[:, 1:, None]).mean().item()
    assert len(told.seen) == told.total == 6 and len({found[0].nll, found[KEPT].nll, full}) == 3
    assert found[0].targets == found[KEPT].targets == 19
    assert converted == {0: found[0]}  # keeps nothing


def test_a_window_that_text_never_leaves_is_an_error() -> None:
    model = tiny_model("llama")
    live = live_of(model)
    with one_thread(), torch.no_grad(), pytest.raises(TouchedNothing), evicting(live, 20):
        model(tiny_text(1, 20))
