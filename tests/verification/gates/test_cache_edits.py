"""Edited caches: one pass under a mask computes what a cache computes whose entries were really taken out or put in."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.measured import Told, subject
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from helpers.tiny_checkpoint import MEASURED, Place, surgery_command
from transformers import DynamicCache, PreTrainedModel

from surgery.live.graft import fold, grafted
from surgery.verification.gates.cache_edits import EDITS, CacheEdits, editing
from surgery.verification.gates.streaming import KEPT

PREFIX = [1, 5]
LENGTH, CONTEXT, TOKENS = 40, 20, 8
Entries = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys, values (B, H, S, D)


def run(model: PreTrainedModel, text: torch.Tensor, places: range, held: Entries) -> tuple[torch.Tensor, Entries]:
    """Logits of the tokens at `places`, which see the cache `held` and each other, and their own entries."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(held):
        cache.update(keys, values, layer)
    positions = torch.tensor([list(places)])
    out = model(text[:, places.start : places.stop], past_key_values=cache, position_ids=positions, use_cache=True)
    return out.logits, [(part.keys[:, :, -len(places) :], part.values[:, :, -len(places) :]) for part in cache.layers]


def joined(*parts: Entries) -> Entries:
    layers = zip(*parts, strict=True)
    return [tuple(torch.cat(states, dim=2) for states in zip(*layer, strict=True)) for layer in layers]


def edited(model: PreTrainedModel, text: torch.Tensor, kind: str, first: int, end: int) -> torch.Tensor:
    """Logits behind the context, by a cache that is edited as a server would."""
    front = run(model, text, range(first), [])[1] if first else []
    if kind == "delete":
        whole = run(model, text, range(CONTEXT), [])[1]
        parts = [[tuple(s[:, :, kept] for s in layer) for layer in whole] for kept in (slice(first), slice(end, None))]
    else:
        span, back = (run(model, text, places, front)[1] for places in (range(first, end), range(end, CONTEXT)))
        parts = [*([front] if first else []), span, back]
    return run(model, text, range(CONTEXT, LENGTH), joined(*parts))[0]


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("keep", [0, KEPT])
@pytest.mark.parametrize("edit", EDITS)
def test_a_mask_computes_what_an_edited_cache_does(edit: str, keep: int, slots: bool) -> None:
    model, text = tiny_model("llama"), tiny_text(2, LENGTH)
    live = live_of(model)
    kind, place = edit.split("_")
    first, end = (keep, TOKENS) if place == "first" else (6, 14)
    with one_thread(), torch.no_grad(), contextlib.ExitStack() as stack:
        if slots:
            stack.enter_context(grafted(live, fold(live, PREFIX, "as_prefix")))
        expected, whole = edited(model, text, kind, first, end), model(text).logits[:, CONTEXT:]
        with editing(live, edit, TOKENS, CONTEXT, keep):
            found = model(text).logits[:, CONTEXT:]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert (found - whole).abs().max() > 1e-3


def test_every_edit_is_scored_on_the_same_second_half() -> None:
    model, text, told = tiny_model("llama"), tiny_text(3, LENGTH), Told()
    live = live_of(model)
    with one_thread():
        gate = CacheEdits(tokens=TOKENS, max_ratio=1.0)
        found = gate.measure(subject(live, text, told), None)
        converted = gate.measure(subject(live, text, Told(), original=False), None)
        with torch.no_grad():
            logits = model(text).logits[:, CONTEXT:-1].log_softmax(-1)
    assert len(told.seen) == told.total == 3 * 7 and len(found) == 7
    assert converted == {key: score for key, score in found.items() if key[1] == 0}  # keeps nothing
    assert found["none", 0].nll == pytest.approx(-logits.gather(-1, text[:, CONTEXT + 1 :, None]).mean().item())
    assert len({score.nll for score in found.values()}) == 7
    assert {score.targets for score in found.values()} == {LENGTH - CONTEXT - 1}


@pytest.mark.slow
def test_gates_on_edited_caches(place: Place, tmp_path: Path) -> None:
    recipe, out, result = tmp_path / "e.yaml", tmp_path / "out", tmp_path / "v.json"
    plain = place.recipe.read_text().rstrip()
    recipe.write_text(plain + "\n  cache_edits: {tokens: 8, max_ratio: 3.0}\n")
    texts = ("--text", place.text, *MEASURED)
    ended = surgery_command("run", recipe, place.source, out, *texts, "--json", result)
    assert ended.code == 0 and "middle tokens inserted" in ended.out, ended.err
    verdict = json.loads(result.read_text())
    found, gates = verdict["cache_edits"], {gate["name"]: gate["value"] for gate in verdict["gates"]}
    assert list(found) == ["none", *EDITS]
    for edit in EDITS:
        entry = found[edit]
        assert gates[f"cache_edits.{edit}"] == pytest.approx(math.exp(entry["delta_nll"]["converted_vs_kept"]["high"]))
        for whose in ("original", "converted"):
            price = math.log(entry[whose]["ppl"] / found["none"][whose]["ppl"])
            assert entry["delta_nll"][whose]["mean"] == pytest.approx(price) and price != 0
        assert (entry["original"] == entry["original_kept"]) is edit.endswith("middle")
    assert surgery_command("verify", out, "--against", place.source, *texts, "--json", result).code == 0
    assert json.loads(result.read_text())["cache_edits"] == found
    recipe.write_text(plain + "\n  cache_edits: {tokens: 8, max_ratio: 0.01}\n")
    failed = surgery_command("run", recipe, place.source, tmp_path / "failed", *texts)
    assert failed.code == 1 and "cache_edits.delete_first" in failed.error
    recipe.write_text(plain + "\n  cache_edits: {tokens: 9, max_ratio: 3}\n")
    refused = surgery_command("run", recipe, place.source, tmp_path / "refused", *texts)
    assert refused.code == 2 and "--chunk-length" in refused.error
