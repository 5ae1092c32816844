"""Agreement of greedy tokens: counted place by place, judged at the lower end, asked of both models in one pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.measured import measured
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from helpers.tiny_checkpoint import MEASURED, RECIPE, Place, surgery_command
from hypothesis import given
from hypothesis import strategies as st

from surgery.live.graft import fold, grafted
from surgery.live.score import Score
from surgery.live.stream import Batch, stream
from surgery.verification.gates.agreement import NONE_IN, Agreement, Greedy
from surgery.verification.gates.base import Measured

PREFIX = (5, 7)


def seen(tokens: torch.Tensor) -> Greedy:
    """As if these had been the most likely tokens (N, T - 1)."""
    observer = Greedy()
    logits = torch.nn.functional.one_hot(tokens, 9).float()
    observer.logits(torch.cat([logits, logits[:, :1]], dim=1), Batch(torch.zeros(len(tokens), tokens.shape[1] + 1), 0))
    return observer


def both(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[Measured, Measured]:
    score = Score((1.0,) * len(ours), ours.shape[1])
    original, converted = measured(control=score), measured(converted=score)
    original.watched["agreement"] = {"control": seen(theirs)}
    converted.watched["agreement"] = {"converted": seen(ours)}
    return original, converted


def test_the_argmax_after_each_token_of_the_text_is_kept() -> None:
    """With a prefix and without: places of the prefix are left out, and so is the one after the last token."""
    model, text = tiny_model("llama"), tiny_text(3, 12)
    live = live_of(model)
    for prefix in ((), PREFIX):
        observer = Greedy()
        with one_thread(), torch.no_grad():
            stream(live, text, [observer], prefix=prefix)
            whole = torch.cat([torch.tensor([prefix], dtype=torch.long).expand(3, -1), text], dim=1)
            expected = model(whole).logits[:, len(prefix) : -1].argmax(-1)
        assert torch.equal(observer.tokens, expected) and observer.tokens.shape == (3, 11)


def test_a_folded_model_agrees_with_the_prefixed_original() -> None:
    model, text = tiny_model("mistral"), tiny_text(3, 30)
    live = live_of(model)
    control, folded, bare = Greedy(), Greedy(), Greedy()
    with one_thread():
        stream(live, text, [control], prefix=PREFIX)
        stream(live, text, [bare])
        with grafted(live, fold(live, PREFIX, "as_prefix")):
            stream(live, text, [folded])
    assert torch.equal(control.tokens, folded.tokens)
    assert not torch.equal(control.tokens, bare.tokens)


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=2, max_size=5))
def test_shares_are_counted_chunk_by_chunk(rows: list[list[int]]) -> None:
    ours, theirs = torch.tensor(rows), torch.ones(len(rows), 4, dtype=torch.long)
    original, converted = both(ours, theirs)
    gate = Agreement(min_share=0.5)
    found = gate.found(original, converted, None)["agreement"]
    equal = [sum(token == 1 for token in row) for row in rows]
    assert found["share"]["mean"] == pytest.approx(sum(equal) / (4 * len(rows)))
    assert 0 <= found["share"]["low"] <= found["share"]["mean"] <= found["share"]["high"] <= 1
    assert found["tokens"] == 4 * len(rows)
    judged = gate.judge(original, converted)[0]
    assert judged.value == found["share"]["low"] and judged.passed == (found["share"]["low"] >= 0.5) and judged.minimum


def test_no_difference_on_few_tokens_is_not_certainty() -> None:
    same = torch.ones(2, 50, dtype=torch.long)
    original, converted = both(same, same)
    assert Agreement(min_share=0.96).judge(original, converted)[0].passed
    assert not Agreement(min_share=0.98).judge(original, converted)[0].passed
    assert Agreement(min_share=1).judge(original, converted)[0].value == 1 - NONE_IN / 100
    assert Agreement(min_share=1).judge(None, converted) == []


@pytest.mark.slow
def test_a_run_is_judged_and_shown(place: Place, tmp_path: Path) -> None:
    """Through the command: in the verdict, on screen, on the card, and again by verify."""
    recipe, verdict = tmp_path / "r.yaml", tmp_path / "v.json"
    recipe.write_text(RECIPE + "  agreement: {min_share: 0.9}\n", encoding="utf-8")
    out, texts = tmp_path / "out", ("--text", place.text, *MEASURED)
    ended = surgery_command("run", recipe, place.source, out, *texts, "--json", verdict)
    assert ended.code == 0, ended.err
    found = json.loads(verdict.read_text(encoding="utf-8"))
    gate = next(gate for gate in found["gates"] if gate["name"] == "agreement")
    assert gate["minimum"] and gate["limit"] == 0.9 and gate["value"] == found["agreement"]["share"]["low"]
    assert found["agreement"]["tokens"] == 4 * 31 and found["agreement"]["share"]["mean"] == 1
    assert "greedy decoding" in ended.out.lower() and "Agreement" in (out / "README.md").read_text(encoding="utf-8")
    again = tmp_path / "again.json"
    assert surgery_command("verify", out, "--against", place.source, *texts, "--json", again).code == 0
    assert json.loads(again.read_text(encoding="utf-8"))["agreement"] == found["agreement"]


def test_a_share_that_is_too_small_fails(place: Place, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE + "  agreement: {min_share: 1}\n", encoding="utf-8")
    ended = surgery_command("run", recipe, place.source, tmp_path / "out", "--text", place.text, *MEASURED)
    assert ended.code == 1 and "agreement" in ended.error and "at least 1" in ended.error
    assert not (tmp_path / "out").exists()
