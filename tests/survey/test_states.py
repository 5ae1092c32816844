"""What a state remembers of what led the text, against mixers called by hand; a fold changes no figure."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.families import any_model
from helpers.tiny import live_of, one_thread

from surgery.live.graft import fold, grafted
from surgery.live.model import Live
from surgery.live.stream import stream
from surgery.survey.states import NEAR, States

PREFIX = [1, 5, 7]
FIGURES = ("state_first", "state_rest", "lead_near", "lead_far")


def found(live: Live, text: torch.Tensor, prefix: tuple[int, ...] | list[int] = (), every: int = 1) -> dict[int, dict]:
    states = States(every)
    with one_thread():
        stream(live, text, [states], prefix=prefix)
    return states.rows()


def by_hand(module: torch.nn.Module, given: torch.Tensor) -> dict[str, float]:
    """The figures of a short convolution that was given (1, T, d), of a model without a prefix."""
    without = given.clone()
    without[:, 0] = 0
    y, other = (module.forward(hidden_states=x)[0] for x in (given, without))
    norms, change = y.norm(dim=-1), (y - other).norm(dim=-1) / y.norm(dim=-1)
    return {
        "state_first": norms[0].item(), "state_rest": norms[1:].mean().item(),
        "lead_near": change[1 : 1 + NEAR].mean().item(), "lead_far": change[-NEAR:].mean().item(),
    }  # fmt: skip


def _keep(seen: dict[str, torch.Tensor], name: str, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    seen[name] = (*args, *kwargs.values())[0]


@torch.inference_mode()
def test_a_convolution_forgets_after_its_kernel() -> None:
    live, text = live_of(any_model("lfm2").double()), torch.arange(40)[None] % 90
    seen: dict[str, torch.Tensor] = {}
    for mixer in live.anatomy.mixers:
        module = live.trunk.get_submodule(mixer.name)
        keep = functools.partial(_keep, seen, mixer.name)
        module.register_forward_pre_hook(keep, with_kwargs=True)
    rows = found(live, text)
    assert len(rows) == len(live.anatomy.mixers) > 1 and {row["mixer"] for row in rows.values()} == {"Lfm2ShortConv"}
    for mixer, (layer, row) in zip(live.anatomy.mixers, sorted(rows.items()), strict=True):
        assert f"layers.{layer - 1}." in mixer.name
        wanted = by_hand(live.trunk.get_submodule(mixer.name), seen[mixer.name])
        assert {name: row[name] for name in FIGURES} == pytest.approx(wanted, rel=1e-12)
        assert row["lead_near"] > 0.01 and row["lead_far"] == 0


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "jamba", "minimax", "falcon_h1"])
@torch.inference_mode()
def test_a_fold_changes_no_figure(kind: str) -> None:
    live = live_of(any_model(kind).double())
    text = torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(2))
    after, bare = found(live, text, PREFIX), found(live, text)
    with one_thread():
        folded = fold(live, PREFIX, "as_prefix")
    with grafted(live, folded):
        again = found(live, text)
    for layer, row in after.items():
        assert again[layer]["mixer"] == row["mixer"]
        for name in FIGURES:
            assert again[layer][name] == pytest.approx(row[name], rel=1e-4, abs=1e-9), (layer, name)
            assert name == "lead_far" or bare[layer][name] != pytest.approx(row[name], rel=1e-3)


def test_short_texts_and_every_other_batch() -> None:
    live = live_of(any_model("lfm2"))
    short = found(live, torch.ones(1, 2 * NEAR, dtype=torch.long))
    assert all(row["lead_near"] is None and row["state_rest"] is not None for row in short.values())
    one = found(live, torch.ones(1, 1, dtype=torch.long))
    assert all(row["state_rest"] is None and row["state_first"] > 0 for row in one.values())
    assert found(live_of(any_model("llama")), torch.ones(1, 20, dtype=torch.long)) == {}
