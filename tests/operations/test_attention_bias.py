"""Whether there is anything to fold: a model without massive activations is left alone, unless a prefix is listed."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.bench import AUTO, snapshot
from helpers.planted import planted, planted_text
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from helpers.tiny_checkpoint import surgery_command

from surgery.live.text import Chunking
from surgery.operations.prefix_search import PrefixSearch
from surgery.steps.options import RunOptions
from surgery.verbs.run import run


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


class OnlySpecials:
    """What the search asks of a tokenizer; no text is a token."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": []}


def search(live, text: torch.Tensor) -> PrefixSearch:
    return PrefixSearch(live, OnlySpecials(), text, "as_prefix")


@pytest.mark.parametrize("rest", ["", "  - smoothing: {}\n"], ids=["alone", "beside smoothing"])
def test_without_massive_activations_nothing_is_written(bench, rest):
    before = snapshot(bench.place.root)
    recipe = AUTO.replace("verify:", f"{rest}verify:")
    ended = surgery_command(*bench.run(None, recipe, "--json", bench.root / "v.json"))
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert said.startswith("nothing to do, and ") and "no massive activations on the calibration text" in said
    assert not bench.out.exists() and not list(bench.root.glob(".out*"))
    verdict = json.loads((bench.root / "v.json").read_text())
    assert verdict["passed"] is None and verdict["gates"] == [] and verdict["provenance"]["source"]["sha256"]
    assert "leave attention_bias out." in verdict["nothing_to_do"]
    assert snapshot(bench.place.root) == before


def test_slots_always_visible_are_searched_all_the_same(bench):
    recipe = AUTO.replace("prefix: auto", "prefix: auto\n      max_slots: 1\n      slots_visible: always")
    path = bench.file("r.yaml", recipe)
    options = RunOptions(text=[bench.place.text], verify=False, chunking=Chunking(4, 32))
    verdict = run(path, str(bench.place.source), bench.out, options)
    assert "nothing_to_do" not in verdict and bench.out.exists() and len(verdict["prefix"]["ids"]) == 1


def test_it_is_found_in_text_and_on_openings_alone():
    """Token 1 is massive in the planted model, and is the tokenizer's BOS: it need not be in the text."""
    with_it, without = planted_text(), tiny_text(3)
    assert not (without <= 2).any()
    assert search(planted(), with_it).finds_any()
    assert search(planted(), without).finds_any()
    assert not search(live_of(tiny_model("llama")), without).finds_any()


def test_a_spike_on_a_small_scale_counts():
    """Far below 100, Sun's least magnitude, but fifty times what ordinary tokens have."""
    model, text = tiny_model("llama"), tiny_text(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.02)
        model.model.embed_tokens.weight[int(text[0, 7]), 3] = 1.0
    found = search(live_of(model), text)
    assert found.finds_any() and found._survey[0].count == 0
