"""A rotated model is the same function to rounding, or refused with the reason; on disk it loads as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.families import EXACT, any_model, families, in_tiers
from helpers.pair import slots_of
from helpers.tiny import build, live_of, one_thread, tiny_model, tiny_text
from helpers.tiny_checkpoint import Place, edit_json, rehash, save_tokenizer, write_text
from transformers import AutoModelForCausalLM

import surgery
from surgery.anatomy.sites import examine
from surgery.checkpoint.layout import read_layout
from surgery.checkpoint.manifest import read_manifest
from surgery.converted.reading import load_converted
from surgery.errors import DamagedCheckpoint, UnsupportedModel
from surgery.live.graft import fold, grafted, normed
from surgery.live.model import Live
from surgery.live.quantised import activation_ranges
from surgery.live.text import Chunking
from surgery.operations.base import Target
from surgery.operations.head_norm import HeadNorm, fit_norms
from surgery.operations.rotation import Rotation, Turns, turn, turns_of
from surgery.steps.options import RunOptions, VerifyOptions
from surgery.steps.recipe import parse_recipe

SCALES = "scales channels of the residual stream, and nothing else can take it over"
UNSEEN = "text does not show what it does"
# Norms that write to the stream (after layers, or after embeddings), images that do, positions that are no weights.
REFUSED = {
    **dict.fromkeys(
        """
        afmoe axk1 beam bert bert-generation bloom electra ernie exaone4 flex_olmo gemma2 gemma3 gemma3_text
        gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm4 hyperclovax kolibri1 longcat_flash
        lfm3 minimax modernbert-decoder olmo2 olmo3 olmo_hybrid openai-gpt opt rembert roc_bert zaya
        """.split(),
        SCALES,
    ),
    **dict.fromkeys(
        """
        axk2 deepseek_v32 dots3_note dots3_note_text emu3 fuyu glm_moe_dsa got_ocr2 hy_v4 llama4
        moss_transcribe_diarize phi4_multimodal qwen3_5 qwen3_5_moe
        """.split(),
        UNSEEN,
    ),
    **dict.fromkeys(("zamba", "zamba2"), "is the tensor of another place as well"),
    "ctrl": "transformer.pos_encoding, which is no weight, is added to the residual stream",
    "xglm": "what is outside of the blocks depends on the basis of the residual stream",
}  # fmt: skip
# Heads that stay: clipped values, a norm or a gate after attention, experts for attention, a scale on values.
STILL = {
    "bailing_hybrid", "bitnet", "dbrx", "jetmoe", "laguna", "mimo_v2_flash", "mpt", "olmo", "olmoe", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_next",
}  # fmt: skip
TOLERANCE = 1e-5  # relative to the largest logit: norms and softmax compute in float32
FLOAT32 = 1e-4

RECIPE = """surgery: 1
operations:
  - attention_bias: {prefix: ["<s>", "\\n"]}
  - rotation: {}
  - smoothing: {}
verify:
  equivalence: {max_delta_nll: 1.0e-4}
  perplexity: {max_ratio: 2.0}
  massive_activations: {max: 1000000}
"""
ALONE = "surgery: 1\noperations:\n  - attention_bias: {prefix: [1, 5]}\n  - rotation: {}\n"
CHUNKS = Chunking(4, 32)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def same(before: dict[str, torch.Tensor], model) -> bool:
    after = dict(model.named_parameters(remove_duplicate=False))
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def rotate(live: Live, **settings) -> Turns:
    turns = turns_of(live, Rotation(**settings))
    turn(live, turns)
    return turns


@torch.no_grad()
def logits(model, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text, use_cache=False).logits


def difference(after: torch.Tensor, before: torch.Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


# ---- the same function


@pytest.mark.parametrize("kind", in_tiers(EXACT))
def test_each_family_is_exact_or_refused(kind: str) -> None:
    family, text = families()[kind], tiny_text()
    with family.default_dtype():
        model = build(family.config())
        live, before, expected = live_of(model), parameters(model), logits(model, text)
        if kind in REFUSED:
            with pytest.raises(UnsupportedModel) as caught:
                turns_of(live, Rotation())
            assert REFUSED[kind] in str(caught.value) and str(caught.value).endswith("leave rotation out.")
            assert same(before, model), "changed, though refused"
            return
        turns = turns_of(live, Rotation())
        assert same(before, model), "changed while it was looked at"
        turn(live, turns)
        # Kernels of a state compute in float32, and what is in the last bit there grows from token to token.
        assert difference(logits(model, text), expected) < (1e-3 if live.anatomy.mixers else TOLERANCE)
    assert turns.sites == (0 if kind in STILL else len(live.anatomy.sites))


@pytest.mark.parametrize("settings", [{}, {"kind": "random"}, {"heads": False}, {"seed": 3}], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "mistral", "qwen2"])
def test_exact_with_biases_and_tied_embeddings(model_type: str, settings: dict) -> None:
    """With every kind of matrix, in float64 and float32; embeddings tied where the family ties them."""
    for dtype, tolerance in ((torch.float64, TOLERANCE), (torch.float32, FLOAT32)):
        model, text = tiny_model(model_type, dtype), tiny_text()
        expected, before = logits(model, text), parameters(model)
        turns = rotate(live_of(model), **settings)
        assert difference(logits(model, text), expected) < tolerance
        assert turns.kind == settings.get("kind", "hadamard")
        assert turns.apart == (("lm_head.weight",) if model_type in ("gpt2", "opt") else ())
        after = dict(model.named_parameters(remove_duplicate=False))
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed <= {name for name, _ in turns.changes}
        assert {name for name in changed if "q_proj" in name or "c_attn" in name}


def test_embeddings_stay_tied_where_both_turn_alike() -> None:
    model, text = any_model("cohere"), tiny_text()
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    expected = logits(model, text)
    turns = rotate(live_of(model))
    assert turns.apart == () and model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(logits(model, text), expected) < TOLERANCE


def test_a_width_without_hadamard_takes_a_random_matrix() -> None:
    model = build(families()["llama"].config(hidden_size=36, num_attention_heads=6, num_key_value_heads=2, head_dim=6))
    text = tiny_text()
    expected = logits(model, text)
    assert rotate(live_of(model)).kind == "hadamard"  # 36 = 2 (17 + 1)
    model = build(families()["llama"].config(hidden_size=30, num_attention_heads=5, num_key_value_heads=5, head_dim=6))
    expected = logits(model, text)
    assert rotate(live_of(model)).kind == "random"
    assert difference(logits(model, text), expected) < TOLERANCE


def test_half_precision_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="proved in float32 or float64, and the model is in memory as"):
        turns_of(live_of(tiny_model("llama", torch.bfloat16)), Rotation())


def test_what_computes_infinities_is_damage() -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] = 3e38
    with pytest.raises(DamagedCheckpoint, match="computes NaN or Inf"):
        turns_of(live_of(model), Rotation())


# ---- beside slots and norms


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_slots_turn_with_the_heads(model_type: str, heads: bool) -> None:
    live, text = live_of(any_model(model_type)), tiny_text()
    folded = fold(live, [1, 5], "as_prefix")
    before = {name: tuple(part.clone() for part in slots) for name, slots in slots_of(folded).items()}
    with grafted(live, folded):
        expected = logits(live.model, text)
        turns = rotate(live, heads=heads)
        assert difference(logits(live.model, text), expected) < TOLERANCE
        names = [name for name, _ in turns.changes if "attention_bias" in name]
        assert len(names) == (len(live.anatomy.sites) if heads else 0)
        for site in live.anatomy.sites:
            module = live.trunk.get_submodule(site.name).attention_bias
            assert torch.equal(module.key, before[site.name][0])
            assert torch.equal(module.value, before[site.name][1]) != heads
    again = fold(live, [1, 5], "as_prefix")
    for name, (_, value) in slots_of(again).items():
        assert torch.allclose(value, slots_of(folded)[name][1], rtol=0, atol=1e-5), "the slots of the rotated model"


def test_heads_that_are_normed_stay_as_they_are() -> None:
    live = live_of(tiny_model("llama"))
    with grafted(live, fold(live, [1], "as_prefix")):
        described = HeadNorm(gate=1.0).described(live.anatomy)
        norms, _ = fit_norms(live, described, 1.0, tiny_text())
        with normed(live, described, norms):
            expected = logits(live.model, tiny_text())
            assert rotate(live).sites == 0
            assert difference(logits(live.model, tiny_text()), expected) < TOLERANCE


# ---- what it is for


def test_a_large_channel_is_spread_over_all() -> None:
    model, text = build(families()["llama"].config(hidden_size=128, head_dim=32)), tiny_text(4)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 9] *= 200
        for layer in model.model.layers:
            layer.input_layernorm.weight[9] = 30.0
    live = live_of(model)
    before = activation_ranges(live, text)["layers.0.self_attn.q_proj"]
    rotate(live)
    assert activation_ranges(live, text)["layers.0.self_attn.q_proj"] < before / 50


# ---- planned, written, loaded


def target_of(root: Path) -> Target:
    return Target(examine(json.loads((root / "config.json").read_text())), read_layout(root))


def test_the_plan_says_what_may_change_and_be_added(tmp_path: Path) -> None:
    tiny_model("gpt2", torch.bfloat16).save_pretrained(tmp_path)
    changes = Rotation().plan(target_of(tmp_path))
    assert set(changes.changed) == set(read_layout(tmp_path).tensors) - {"transformer.h.0.attn.bias"}
    assert set(changes.changed.values()) == {"may change"}
    assert {name: (stored.dtype, stored.shape) for name, stored in changes.added.items()} == {
        "lm_head.weight": ("BF16", (97, 32))
    }
    assert changes.config["tie_word_embeddings"] is False and changes.words


def test_what_is_stored_in_another_form_is_refused_at_plan(tmp_path: Path) -> None:
    any_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="does not store model.layers.0"):
        Rotation().plan(target_of(tmp_path))


@pytest.fixture(scope="module")
def rotated(place: Place, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("rotated") / "out"
    options = RunOptions(text=[place.text], chunking=CHUNKS)
    return out, surgery.run(parse_recipe(RECIPE, "recipe"), str(place.source), out, options)


def test_a_rotated_checkpoint_passes_and_verifies(rotated: tuple[Path, dict], place: Place) -> None:
    out, verdict = rotated
    assert verdict["passed"] and 0 < abs(verdict["delta_nll"]["vs_control"]["mean"]) < 1e-5
    statuses = [entry.status for entry in read_manifest(out).tensors.values()]
    assert statuses.count("changed") >= 16 and statuses.count("added") == 4  # keys and values of two sites
    assert "Its residual stream is rotated by a Hadamard matrix" in " ".join((out / "README.md").read_text().split())
    again = surgery.verify(out, VerifyOptions(against=str(place.source), text=[place.text], chunking=CHUNKS))
    assert again["passed"]


@pytest.fixture(scope="module", params=["gpt2", "megatron-bert", "falcon"])
def untied(request, tmp_path_factory) -> tuple[Path, Path]:
    """Source and output of families that tie embeddings (GPT-2 in bfloat16, as a bare trunk, without its lead)."""
    root, kind = tmp_path_factory.mktemp("untied"), request.param
    model = build(families()[kind].config()).to(torch.bfloat16 if kind == "gpt2" else torch.float32)
    (model.transformer if kind == "gpt2" else model).save_pretrained(root / "source")
    surgery.run(parse_recipe(ALONE, "recipe"), str(root / "source"), root / "out", RunOptions(verify=False))
    return root / "source", root / "out"


def test_the_output_layer_is_added_where_it_was_tied(untied: tuple[Path, Path]) -> None:
    source, out = untied
    control, text = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), tiny_text()
    prefixed = torch.cat([torch.tensor([[1, 5]]).expand(len(text), -1), text], dim=1)
    model = load_converted(out)
    half = any(info.dtype == "BF16" for info in read_layout(source).tensors.values())
    assert difference(logits(model, text), logits(control, prefixed)[:, 2:]) < (2e-2 if half else FLOAT32)
    entries = read_manifest(out).tensors
    added = {name for name, entry in entries.items() if entry.status == "added" and "attention_bias" not in name}
    output = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert f"{output}.weight" in added and entries[f"{output}.weight"].dtype == ("BF16" if half else "F32")
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["untied"].keys() == added
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("entry", [None, {"lm_head.weight": 3}, {"lm_head.weight": ["F32", [97, 33]]}])
def test_verify_sees_an_entry_that_was_changed(untied: tuple[Path, Path], tmp_path: Path, entry) -> None:
    source, out = untied
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_json(tmp_path / "config.json", untied=entry)
    rehash(tmp_path)
    verdict = surgery.verify(tmp_path, VerifyOptions(against=str(source)))
    failed = [check["name"] for check in verdict["integrity"]["checks"] if not check["passed"]]
    assert not verdict["passed"] and set(failed) & {"added", "slots", "untied embeddings"}


def test_tied_embeddings_pass_every_gate_on_disk(tmp_path: Path) -> None:
    """With a tokenizer and text, through a fresh load and the integrity check."""
    model = build(families()["llama"].config(vocab_size=320, tie_word_embeddings=True)).float()
    model.save_pretrained(tmp_path / "source")
    text = write_text(tmp_path / "text", 1500, seed=1)
    save_tokenizer(tmp_path / "source", text)
    options = RunOptions(text=[text], chunking=CHUNKS)
    verdict = surgery.run(parse_recipe(RECIPE, "recipe"), str(tmp_path / "source"), tmp_path / "out", options)
    assert verdict["passed"], verdict
    assert "untied embeddings" in [check["name"] for check in verdict["integrity"]["checks"]]
