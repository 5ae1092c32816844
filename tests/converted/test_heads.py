"""Classifiers and other heads of a converted checkpoint: they are those of the original after the prefix."""

from __future__ import annotations

import pytest
import torch
from helpers.families import EXACT, any_model, in_tiers
from helpers.fresh_process import ask, load
from helpers.pair import PREFIX, N, Pair, padded, worst
from helpers.tiny import one_thread, tiny_model, tiny_text
from transformers.models.auto import modeling_auto

from surgery.anatomy.classes import ANY as TRUNK
from surgery.anatomy.classes import CAUSAL
from surgery.converted.derived import derive, load_derived
from surgery.converted.registration import register
from surgery.live.graft import eab_config
from surgery.runtime.eab_runtime import find_trunk
from surgery.steps.options import RunOptions
from surgery.steps.recipe import parse_recipe
from surgery.verbs.run import run

LABELS = 3
SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
ANSWER = "AutoModelForQuestionAnswering"
RECIPE = f"surgery: 1\noperations:\n  - attention_bias: {{prefix: {PREFIX}}}\n"
ON_DISK = ("llama", "qwen2", "mistral", "gpt2", "gemma2")


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


def heads(family: str) -> dict[str, str]:
    """Auto class -> derived class, of all but the trunk and what is the causal language model by another name."""
    found = derive(family).classes
    return {
        auto: name for auto, name in found.items() if auto != TRUNK and name not in (found[CAUSAL], found.get(TRUNK))
    }


WITH_HEADS = [family for family in EXACT if heads(family)]


def states(model, **arguments) -> torch.Tensor:
    return model.base_model(**arguments, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", in_tiers(WITH_HEADS))
@torch.no_grad()
def test_trunk_of_every_head_is_that_after_the_prefix(family):
    """Built by the derived classes as Auto classes find them, with slots at each site once, in float64."""
    pair, module, derived = Pair(any_model(family)), load_derived(family), derive(family)
    ids = tiny_text()
    expected = states(pair.model, input_ids=torch.cat([torch.tensor([PREFIX] * 2), ids], 1))[:, N:]
    config = {**pair.model.config.to_dict(), "eab": eab_config(pair.live.anatomy, PREFIX, "as_prefix")}
    config.pop("model_type")
    for name in heads(family).values():
        model = getattr(module, name)(getattr(module, derived.config_class)(**config)).to(torch.float64).eval()
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
        left = model.base_model.load_state_dict(pair.model.base_model.state_dict(), strict=False)
        # BERT's pooler stands in the trunk, and not in that of the causal language model.
        assert all(key.endswith(tuple(pair.folded.tensors)) or "pooler." in key for key in left.missing_keys), name
        trunk = find_trunk(model, pair.live.anatomy.trunk_class)
        assert not trunk.load_state_dict(pair.folded.tensors, strict=False).unexpected_keys, name
        assert worst(states(model, input_ids=ids), expected) < 1e-5, name


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> dict[str, dict]:
    """By family and Auto class: what the original says after the prefix, and a stranger's process of the converted."""
    root, tasks, expected = tmp_path_factory.mktemp("heads"), {}, {}
    rows = [tiny_text(1, length, seed=length)[0] for length in (30, 17, 23)]
    batches = [
        dict(zip(("input_ids", "attention_mask"), padded(rows, side), strict=True)) for side in ("left", "right")
    ]
    for family in ON_DISK:
        source, out = root / family, root / f"{family}-out"
        tiny_model(family, torch.float32).save_pretrained(source)
        run(parse_recipe(RECIPE, "recipe"), str(source), out, RunOptions(verify=False))
        for auto in heads(family):
            # `load` gives the head random weights: they are handed on.
            original, _ = load(source, auto=getattr(modeling_auto, auto), trust_remote_code=False, num_labels=LABELS)
            named = {f"{original.base_model_prefix}."}
            weights = {k: v for k, v in original.state_dict().items() if not k.startswith(tuple(named))}
            with torch.no_grad():
                after = [original(input_ids=torch.cat([torch.tensor(PREFIX), row])[None]) for row in rows]
            expected[f"{family} {auto}"] = [tuple(found.values())[0] for found in after]
            tasks[f"{family} {auto}"] = {
                "path": str(out), "auto": auto, "labels": LABELS, "weights": weights, "batches": batches,
                "scratch": str(root / f"{family}-{auto}"),
            }  # fmt: skip
    report = ask(root, {"families": tasks}, timeout=600)
    return {
        name: {**report[name], "expected": expected[name], "batches": batches, "out": tasks[name]["path"]}
        for name in tasks
    }


@pytest.mark.slow
@pytest.mark.parametrize("auto", [SEQUENCE, TOKEN, ANSWER])
@pytest.mark.parametrize("family", ON_DISK)
def test_a_stranger_loads_the_head_and_gets_the_same(on_disk, family, auto):
    """In padded batches, on either side; a sequence is classified by its last real token."""
    if auto not in heads(family):
        assert (family, auto) == ("gemma2", ANSWER)
        return
    found = on_disk[f"{family} {auto}"]
    if auto == ANSWER and family in (
        "llama",
        "qwen2",
    ):  # these look for the trunk by a name that no checkpoint gives it
        assert "attention_bias.key is missing from the checkpoint" in found["failed"]
        return
    assert "failed" not in found, found["failed"]
    assert found["class"] == derive(family).classes[auto]
    assert all("attention_bias" not in key for key in found["problems"].get("missing_keys", []))
    for batch, output, again in zip(found["batches"], found["outputs"], found["again"], strict=True):
        assert torch.equal(output, again)
        for row, mask, expected in zip(output, batch["attention_mask"].bool(), found["expected"], strict=True):
            row, expected = (row, expected[0]) if auto == SEQUENCE else (row[mask], expected[0, N:])
            assert worst(row, expected) < 1e-5


@torch.no_grad()
def test_after_import_surgery_no_flag_is_needed(place):
    register()
    original, _ = load(place.source, auto=modeling_auto.AutoModelForSequenceClassification, trust_remote_code=False)
    model, info = load(place.converted, auto=modeling_auto.AutoModelForSequenceClassification, trust_remote_code=False)
    assert type(model) is load_derived("llama").EabLlamaForSequenceClassification
    assert info["missing_keys"] == {"score.weight"}
    model.score.load_state_dict(original.score.state_dict())
    ids = tiny_text(1)
    expected = original(input_ids=torch.cat([torch.tensor([model.config.eab["prefix_ids"]]), ids], 1)).logits
    assert worst(model(input_ids=ids).logits, expected) < 1e-4


def test_an_auto_class_without_such_a_head_is_not_named():
    assert heads("llama4_text") == {} and TOKEN not in derive("gemma3_text").auto_map
    assert "AutoModelForImageTextToText" in derive("gemma3").auto_map
