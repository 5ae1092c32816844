"""The main job on a real model: SmolLM2-135M from its GGUF, folded, emitted, verified and used as by a stranger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.anatomy.sites import examine
from surgery.checkpoint.layout import read_layout
from surgery.live.model import Live
from surgery.live.text import Chunking, chunk, tokenize
from surgery.operations.prefix_search import PrefixSearch
from surgery.steps.options import RunOptions
from surgery.steps.recipe import parse_recipe

CHUNKING = Chunking(16, 256)  # enough to see massive activations come and go; the demo measures on 64 x 512
PREFIX = (" ", "\n")
# The interval of so few chunks is wide, so the perplexity gate is wider here than in the recipes that people use.
RECIPE = f"""
surgery: 1
operations:
  - attention_bias: {{prefix: {json.dumps(list(PREFIX))}}}
verify:
  equivalence: {{max_delta_nll: 1.0e-5}}
  perplexity: {{max_ratio: 1.02}}
"""


@pytest.fixture(scope="module")
def converted(smollm2_gguf, wikipedia_evaluation, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("smollm2") / "model"
    options = RunOptions(text=[wikipedia_evaluation], chunking=CHUNKING)
    with pytest.warns(UserWarning, match="pre-tokenizer 'smollm'"):
        verdict = surgery.run(parse_recipe(RECIPE, "test"), str(smollm2_gguf), out, options)
    return out, verdict


@pytest.fixture(scope="module")
def original(smollm2_gguf):
    """The model as transformers' own loader reads it, a path that shares no code with ours."""
    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def emitted(converted):
    return AutoModelForCausalLM.from_pretrained(converted[0], trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted[0])


def test_nothing_is_lost_and_no_massive_activation_is_left(converted):
    out, verdict = converted
    assert verdict["passed"] and out.is_dir()
    assert verdict["massive_activations"]["before"]["count"] > 100
    assert 507 in verdict["massive_activations"]["before"]["dims"]
    assert verdict["massive_activations"]["after"]["count"] == 0
    delta = verdict["delta_nll"]["vs_control"]
    assert max(abs(delta["low"]), abs(delta["high"])) <= 1e-5
    tokens = {name: score["tokens"] for name, score in verdict["perplexity"].items()}
    assert set(tokens) == {"bare", "bos", "control", "converted"} and len(set(tokens.values())) == 1


def test_kept_tensors_are_those_of_the_independent_loader(converted, original):
    layout, theirs = read_layout(converted[0]), original.state_dict()
    manifest = json.loads((converted[0] / "surgery.json").read_text(encoding="utf-8"))
    kept = [name for name, entry in manifest["tensors"].items() if entry["status"] == "kept"]
    assert len(kept) == 272 and len(manifest["tensors"]) == 272 + 2 * 30
    ours = AutoModelForCausalLM.from_pretrained(converted[0], trust_remote_code=True).state_dict()
    assert set(kept) <= set(layout.tensors)
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)


def test_generates_what_the_prefixed_original_generates(emitted, original, tokenizer):
    text = tokenizer("The history of the city begins in the third century, when", return_tensors="pt")["input_ids"]
    # One by one: together they would merge into a single token.
    prefix = torch.tensor([[id_ for token in PREFIX for id_ in tokenizer(token)["input_ids"]]])
    assert prefix.shape[1] == len(PREFIX)
    behind = torch.cat([prefix, text], dim=1)
    arguments = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    with torch.inference_mode():
        ours = emitted.generate(text, attention_mask=torch.ones_like(text), **arguments)[0, text.shape[1] :]
        theirs = original.generate(behind, attention_mask=torch.ones_like(behind), **arguments)[0, behind.shape[1] :]
    assert ours.tolist() == theirs.tolist()


def test_a_left_padded_batch_equals_its_rows_alone(emitted, tokenizer):
    rows = ["Water is", "The capital of the country, which was founded by settlers from the north, is"]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(rows, return_tensors="pt", padding=True)
    with torch.inference_mode():
        together = emitted(**batch).logits[:, -1]
        alone = torch.cat([emitted(**tokenizer(row, return_tensors="pt")).logits[:, -1] for row in rows])
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)


def test_bfloat16_keeps_slots_in_float32_and_stays_close(converted, emitted, tokenizer):
    half = AutoModelForCausalLM.from_pretrained(converted[0], trust_remote_code=True, dtype=torch.bfloat16).eval()
    dtypes = {name.rsplit(".", 2)[-2]: p.dtype for name, p in half.named_parameters()}
    assert dtypes["attention_bias"] == torch.float32 and dtypes["q_proj"] == torch.bfloat16
    ids = tokenizer("The river flows through three countries before it", return_tensors="pt")
    with torch.inference_mode():
        full, rounded = emitted(**ids).logits.log_softmax(-1), half(**ids).logits.float().log_softmax(-1)
    divergence = (full.exp() * (full - rounded)).sum(-1).mean()
    assert divergence < 0.02, f"KL {divergence:.4f} nats"


def test_search_finds_a_prefix_that_leaves_nothing(original, tokenizer, wikipedia_calibration):
    text = wikipedia_calibration.read_text(encoding="utf-8")
    chunks = chunk(tokenize(tokenizer, text), Chunking(8, 256), "calibration")
    search = PrefixSearch(Live(original, examine(original.config.to_dict())), tokenizer, chunks, "as_prefix")
    best = search.run(max_slots=3)
    assert best.massive == 0 and len(best.prefix) >= 2, "one slot is known to leave some on openings of text"
    tried = search.to_dict()["tried"]
    assert tried[0]["prefix_ids"] == list(best.prefix) and tried[0]["chunks"] == 8
    assert any(entry["massive_activations"]["openings"] > 0 for entry in tried)
