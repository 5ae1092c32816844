"""Training from nothing: variants share weights, batches and targets, and differ in nothing but what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.tiny import one_thread
from helpers.tiny_checkpoint import surgery_command, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import surgery
from surgery import results
from surgery.errors import RecipeError, SourceError, SurgeryError
from surgery.live.text import Chunking
from surgery.recipe.file import parse
from surgery.steps.recipe import Recipe
from surgery.tuning.corpus import make_corpus
from surgery.tuning.scratch import loop as loop_module
from surgery.tuning.scratch.loop import text_loss, train
from surgery.tuning.scratch.measure import measure
from surgery.tuning.scratch.settings import VARIANTS, FromScratch, Pretrain
from surgery.tuning.scratch.tokenizer import SINK, SINK_ID, as_pretrained, train_tokenizer
from surgery.tuning.scratch.variants import Variant, base_config, build, initial_weights
from surgery.tuning.tune import make_accelerator
from surgery.verbs.pretrain import pretrain

SMALL = {
    "steps": 4, "length": 32, "batch": 2, "vocabulary": 300, "evaluate_every": 3, "held_out": 2, "warmup": 1,
    "model": {"blocks": 2, "width": 32, "heads": 4},
}  # fmt: skip
SETTINGS = Pretrain.model_validate(SMALL)
RECIPE = f"surgery: 1\npretrain: {json.dumps(SMALL)}\n"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def shared():
    config = base_config(SETTINGS, 300)
    return config, initial_weights(config, seed=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 1500, seed=3)


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, pretrain(parse(RECIPE, "r.yaml", FromScratch), out, text=[text])


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 300, (rows, SETTINGS.length), generator=torch.Generator().manual_seed(5))


def logits(variant: Variant, ids: torch.Tensor, **more) -> torch.Tensor:
    with torch.no_grad():
        return variant.model(input_ids=ids, use_cache=False, **more).logits


# ---- variants


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_starts_from_the_same_weights(shared, name: str) -> None:
    config, weights = shared
    state = build(name, config, weights, slots=2).model.state_dict()
    for key, value in weights.items():
        assert torch.equal(state[key], value), key
    added = {key: value for key, value in state.items() if key not in weights}
    kinds = {"attention_bias": {"key", "value"}, "head_norm": {"weight"}}
    assert {key.rsplit(".", 1)[1] for key in added} == kinds.get(name, set())
    if name == "head_norm":  # pure: weight 1, no gate
        assert all(torch.equal(value, torch.ones(8)) for value in added.values()) and len(added) == 2
    if name == "attention_bias":
        assert all(value.shape == (2, 4, 8) and 0 < value.std() < 0.04 for value in added.values())
        assert len({value.sum().item() for value in added.values()}) == 4  # each drawn for itself


def test_initial_weights_depend_on_the_seed_alone(shared) -> None:
    """The caller's generator is left as it was."""
    config, weights = shared
    torch.manual_seed(77)
    before = torch.get_rng_state()
    again, other = initial_weights(config, seed=0), initial_weights(config, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(again[key], value) for key, value in weights.items())
    assert not torch.equal(other["transformer.wte.weight"], weights["transformer.wte.weight"])


def test_attention_bias_without_slots_is_plain(shared) -> None:
    plain, none = build("plain", *shared), build("attention_bias", *shared, slots=0)
    torch.testing.assert_close(logits(none, tokens()), logits(plain, tokens()), rtol=0, atol=1e-6)


def test_unattended_slots_leave_plain_at_shifted_positions(shared) -> None:
    """Every query is 1 in its first dim, every slot's key -1e9 there: the logits of slots are -1e9 / sqrt(8)."""
    config, weights = shared
    weights = {key: value.clone() for key, value in weights.items()}
    for key, value in weights.items():
        if key.endswith("attn.c_attn.weight"):
            value[:, : 4 * 8 : 8] = 0
            weights[key.replace("weight", "bias")][: 4 * 8 : 8] = 1
    slots = 2
    plain, biased = build("plain", config, weights), build("attention_bias", config, weights, slots=slots)
    ids = tokens()[:, :-slots]  # there are positions for one slot
    for name, parameter in biased.model.named_parameters():
        if name.endswith("attention_bias.key"):
            with torch.no_grad():
                parameter.zero_()[..., 0] = -1e9
    shifted = (torch.arange(ids.shape[1]) + slots)[None]
    expected = logits(plain, ids, position_ids=shifted, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(logits(biased, ids), expected, rtol=0, atol=1e-6)
    unshifted = logits(plain, ids)
    assert (expected - unshifted).abs().max() > 1e-3


def test_a_sink_token_leads_and_is_never_a_target(shared) -> None:
    """The loss is that of tokens 1..T-1 of the text behind the sink token, from logits computed by hand."""
    variant, ids = build("sink_token", *shared), tokens()
    assert variant.lead == (SINK_ID,)
    fronted = torch.cat([torch.full((3, 1), SINK_ID), ids], dim=1)
    log_probs = logits(variant, fronted).double().log_softmax(-1)
    expected = -log_probs[:, 1:-1].gather(2, ids[:, 1:, None]).mean().item()
    assert text_loss(variant.model, ids, variant.lead).item() == pytest.approx(expected, rel=1e-6)
    plain = build("plain", *shared)
    assert text_loss(plain.model, ids, ()).item() == pytest.approx(
        -logits(plain, ids).double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean().item(), rel=1e-6
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_learn_the_same_targets_from_the_same_batches(shared, name: str, monkeypatch) -> None:
    seen = []

    def watched(passed):
        seen.append(passed.tokens.clone())
        assert passed.logits.shape[:2] == passed.tokens.shape
        return lm(passed)

    lm = loop_module.language_modelling
    monkeypatch.setattr(loop_module, "language_modelling", watched)
    corpus = make_corpus(tokens(12).flatten().tolist(), SETTINGS, SETTINGS.length)
    train(build(name, *shared), SETTINGS, corpus, make_accelerator("cpu"))
    expected = [corpus.batch(step, SETTINGS.batch) for step in range(SETTINGS.steps)]
    assert torch.equal(torch.stack(seen), torch.stack(expected))


@pytest.mark.parametrize("name", VARIANTS)
def test_training_learns_and_trains_what_was_added(shared, name: str) -> None:
    settings = SETTINGS.model_copy(update={"steps": 30, "evaluate_every": 30})
    corpus = make_corpus(tokens(4).flatten().tolist(), settings, SETTINGS.length)  # one batch, to be learned by heart
    variant = build(name, *shared)
    before = {key: value.clone() for key, value in variant.model.state_dict().items()}
    losses = train(variant, settings, corpus, make_accelerator("cpu"))["losses"]
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(value, before[key]) for key, value in variant.model.state_dict().items())


# ---- measurements


def test_a_spike_on_the_sink_token_is_not_counted_on_the_text(shared) -> None:
    """A spike on the sink token counts in the residual stream, and not on the text."""
    variant = build("sink_token", *shared)
    with torch.no_grad():
        variant.model.transformer.wte.weight[SINK_ID, 3] = 5e3
    found = measure(variant, tokens())
    assert found["massive"] == 3 * 3 and found["massive_on_text"] == 0  # sequences x layers 0, 1, 2
    assert found["ratio"] > 1e4 > 100 > found["ratio_on_text"]
    assert found["layers"][0]["dims"] == [[3, 3]]
    assert [row["count"] for row in found["layers"]] == [3, 3, 3]


def test_scores_are_those_of_attention_weights(shared) -> None:
    plain, biased = build("plain", *shared), build("attention_bias", *shared)
    uniform = sum(1 / t for t in range(1, SETTINGS.length + 1)) / SETTINGS.length
    assert measure(plain, tokens())["first_score"] == pytest.approx(uniform, rel=0.1)  # at first nearly uniform
    assert measure(plain, tokens())["slot_score"] is None
    with_slot = sum(1 / (t + 1) for t in range(1, SETTINGS.length + 1)) / SETTINGS.length
    found = measure(biased, tokens())
    assert found["slot_score"] == pytest.approx(with_slot, rel=0.1)
    assert found["nll"] == pytest.approx(math.log(300), rel=0.05) and found["ppl"] == math.exp(found["nll"])


# ---- the command


def test_curves_and_checkpoints(trained) -> None:
    out, result = trained
    assert {path.name for path in out.iterdir()} == {*VARIANTS, "curves.json", "curves.png", "curves.svg"}
    assert json.loads((out / "curves.json").read_text()) == result
    assert result["recipe"]["pretrain"]["variants"] == list(VARIANTS) and result["recipe"]["surgery"] == 1
    assert set(result) == set(results.Pretrained.__annotations__)
    assert all(set(results.Curves.__annotations__) <= set(found) for found in result["variants"].values())
    firsts = set()
    for name in VARIANTS:
        found = result["variants"][name]
        assert [row["step"] for row in found["measured"]] == [0, 3, 4] and len(found["losses"]) == 4
        start, middle, end = found["measured"]
        assert start["loss"] is None and middle["loss"] == pytest.approx(sum(found["losses"][:3]) / 3)
        assert end["loss"] == found["losses"][3]
        assert [row["layer"] for row in end["layers"]] == [0, 1, 2]
        assert (end["slot_score"] is not None) == (name in ("sink_token", "attention_bias"))
        firsts.add(found["losses"][0])
    assert len(firsts) == 4  # four functions, from one start


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_load_and_are_what_was_measured(trained, text: Path, name: str) -> None:
    out, result = trained
    model = AutoModelForCausalLM.from_pretrained(out / name)
    tokenizer = AutoTokenizer.from_pretrained(out / name)
    assert isinstance(model, GPT2LMHeadModel) and (type(model) is GPT2LMHeadModel) == (name in ("plain", "sink_token"))
    assert (out / name / "model.safetensors").stat().st_mode == (out / name / "config.json").stat().st_mode
    words = text.read_text()
    ids = tokenizer(words)["input_ids"]
    lead = [SINK_ID] if name == "sink_token" else []
    assert ids[: len(lead)] == lead and SINK_ID not in ids[len(lead) :]
    assert tokenizer.decode(ids[len(lead) :]) == words
    held = torch.tensor(ids[len(lead) :][: 2 * SETTINGS.length]).view(2, -1)
    loss = text_loss(model, held, tuple(lead)).item()
    assert loss == pytest.approx(result["variants"][name]["measured"][-1]["nll"], rel=1e-5)


@pytest.mark.parametrize("name", ["sink_token", "attention_bias", "head_norm"])
def test_what_was_trained_can_be_scanned(trained, text: Path, name: str) -> None:
    found = surgery.scan(str(trained[0] / name), text=[text], chunking=Chunking(2, 16))
    assert found["n_slots"] == (1 if name == "attention_bias" else 0)
    assert found["normed_sites"] == (2 if name == "head_norm" else 0)


def test_a_run_repeats(trained, text: Path, tmp_path: Path) -> None:
    recipe = FromScratch.model_validate({"surgery": 1, "pretrain": {**SMALL, "variants": ["head_norm", "plain"]}})
    again = pretrain(recipe, tmp_path / "out", text=[text])["variants"]
    assert list(again) == ["head_norm", "plain"]
    for name, found in again.items():  # whatever was trained before it
        assert found["losses"] == trained[1]["variants"][name]["losses"]


def test_held_out_text_of_its_own_is_not_trained_on(trained, text: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other.txt", 200, seed=9)
    recipe = FromScratch.model_validate({"surgery": 1, "pretrain": {**SMALL, "variants": ["plain"]}})
    found = pretrain(recipe, tmp_path / "out", text=[text], held_out=[other])
    ids = train_tokenizer(text.read_text(), 300).encode(text.read_text()).ids
    assert found["training_tokens"] == len(ids) // 32 * 32
    assert trained[1]["training_tokens"] == (len(ids) - 64) // 32 * 32
    assert found["variants"]["plain"]["measured"][0] != trained[1]["variants"]["plain"]["measured"][0]


def test_the_command_shows_where_each_variant_ended(text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace('"steps": 4', '"steps": 1'), encoding="utf-8")
    ended = surgery_command("pretrain", recipe, tmp_path / "out", "--text", text, "--json", tmp_path / "result.json")
    assert ended.code == 0, ended.err
    assert all(name in ended.out for name in VARIANTS)
    assert (tmp_path / "result.json").read_text() == (tmp_path / "out" / "curves.json").read_text()


# ---- refusals


def refused(tmp_path: Path, recipe: str, *options: object) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(recipe, encoding="utf-8")
    ended = surgery_command("pretrain", path, tmp_path / "out", *options)
    assert ended.code == 2
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*")), "something was left behind"
    return ended.error


@pytest.mark.parametrize(
    ("changed", "line", "fragments"),
    [
        ({"stepz": 3}, 2, ["unknown key 'pretrain.stepz'", "did you mean 'steps'?"]),
        ({"steps": 0}, 2, ["pretrain.steps is 0", "at least 1"]),
        ({"slots": "two"}, 2, ["pretrain.slots is 'two'", "such as 1"]),
        ({"learning_rate": "fast"}, 2, ["pretrain.learning_rate is 'fast'", "such as 0.002"]),
        ({"variants": []}, 2, ["pretrain.variants is an empty list"]),
        ({"variants": ["plane"]}, 2, ["pretrain.variants[0] is 'plane'", "'head_norm'"]),
        ({"variants": ["plain", "plain"]}, 2, ["names a variant more than once"]),
        ({"vocabulary": 256}, 2, ["pretrain.vocabulary is 256", "at least 257"]),
        ({"model": {"width": 30, "heads": 4}}, 2, ["pretrain.model has 4 heads", "width of 30"]),
        (
            {"model": {"depth": 3}},
            2,
            ["unknown key 'pretrain.model.depth'", "known here: family, blocks, width, heads"],
        ),
        ({"model": 3}, 2, ["pretrain.model is 3", "a mapping of family, blocks, width, heads"]),
    ],
)
def test_a_bad_recipe_is_one_sentence(changed: dict, line: int, fragments: list[str]) -> None:
    text = f"surgery: 1\npretrain: {json.dumps({**SMALL, **changed})}\n"
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml", FromScratch)
    sentence = str(caught.value)
    assert sentence.startswith(f"r.yaml, line {line}: ") and sentence.endswith("."), sentence
    for fragment in fragments:
        assert fragment in sentence


def test_a_recipe_for_the_other_command_says_so() -> None:
    with pytest.raises(RecipeError, match="r.yaml, line 2: 'pretrain' is what surgery pretrain reads"):
        parse(RECIPE, "r.yaml", Recipe)
    converting = "surgery: 1\noperations: [attention_bias: {}]\n"
    with pytest.raises(RecipeError, match="r.yaml, line 2: 'operations' is what surgery run reads"):
        parse(converting, "r.yaml", FromScratch)
    with pytest.raises(RecipeError, match="line 1: the key 'pretrain' is missing; add 'pretrain: {steps: 1000}'"):
        parse("surgery: 1\n", "r.yaml", FromScratch)
    with pytest.raises(RecipeError, match="surgery is 2, and the only recipe format is 1"):
        parse(RECIPE.replace("surgery: 1", "surgery: 2"), "r.yaml", FromScratch)


def test_texts_that_are_too_short(text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A bridge.\n", encoding="utf-8")
    assert "the text has" in refused(tmp_path, RECIPE, "--text", short)
    assert "pretrain needs 128" in refused(tmp_path, RECIPE, "--text", short)
    sentence = refused(tmp_path, RECIPE, "--text", text, "--held-out", short)
    assert "the held-out text has" in sentence and "pretrain.held_out asks for 64" in sentence
    assert "give --text FILE" in refused(tmp_path, RECIPE)


def test_several_processes_are_refused(text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "in one process" in refused(tmp_path, RECIPE, "--text", text)


def test_a_loss_that_is_no_number_leaves_nothing_behind(text: Path, tmp_path: Path, monkeypatch) -> None:
    real, calls = loop_module.language_modelling, []

    def breaking(passed):
        calls.append(1)
        return real(passed) * (math.nan if len(calls) == 6 else 1.0)

    monkeypatch.setattr(loop_module, "language_modelling", breaking)
    sentence = refused(tmp_path, RECIPE, "--text", text)  # four steps of plain, then two of the next
    assert sentence.startswith("the loss of sink_token at step 2 is not a number; lower pretrain.learning_rate")


def test_an_output_that_exists_is_left_alone(text: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    recipe = parse(RECIPE, "r.yaml", FromScratch)
    with pytest.raises(surgery.errors.OutputError, match="exists already"):
        pretrain(recipe, tmp_path / "there", text=[text])
    with pytest.raises(SourceError, match="give --text FILE"):
        pretrain(recipe, tmp_path / "new", text=[])


# ---- the tokenizer


def test_text_that_looks_like_the_sink_token_is_text() -> None:
    words = f"A {SINK} in the water.\n" * 40
    tokenizer = train_tokenizer(words, 300)
    assert tokenizer.get_vocab_size() <= 300 and tokenizer.token_to_id(SINK) == SINK_ID
    ids = tokenizer.encode(words).ids
    assert SINK_ID not in ids and tokenizer.decode(ids) == words
    for leading in (False, True):
        assert as_pretrained(tokenizer, leading)(words)["input_ids"] == [SINK_ID] * leading + ids


# ---- other families


HYBRID = {
    "family": "lfm2", "blocks": 3, "width": 32, "heads": 4,
    "config": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
}  # fmt: skip


@pytest.mark.parametrize("model", [HYBRID, {"family": "llama", "blocks": 2, "width": 32, "heads": 4}])
def test_any_family_is_trained_in_all_variants(model: dict, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = pretrain(
        FromScratch.model_validate({"surgery": 1, "pretrain": {**SMALL, "model": model}}), out, text=[text]
    )
    assert list(found["variants"]) == list(VARIANTS)
    for name in VARIANTS:
        loaded = AutoModelForCausalLM.from_pretrained(out / name)
        assert loaded.config.model_type.endswith(model["family"]) and loaded.config.num_hidden_layers == model["blocks"]
        assert loaded.config.hidden_size == 32 and loaded.config.vocab_size == 300
        scores = [entry["ppl"] for entry in found["variants"][name]["measured"]]
        assert scores[-1] < scores[0]
    survey = surgery.scan(out / "attention_bias", text=text, chunking=Chunking(2, 32))
    assert [row["layer"] for row in survey["layers"] if row.get("mixer")] == ([1, 3] if model is HYBRID else [])


@pytest.mark.parametrize(
    ("model", "fragments"),
    [
        ({"family": "lfm9"}, ["pretrain.model.family", "transformers has no 'lfm9'", "gpt2"]),
        ({"family": "vit"}, ["pretrain.model: vit", "has no causal language model"]),
        ({"family": "gemma3"}, ["it is a multimodal model", "gemma3_text"]),
        ({"family": "mamba"}, ["no layer attends"]),
        ({"family": "bert"}, ["pretrain.model: bert: "]),
        ({"family": "lfm2", "config": {"layer_types": 3}}, ["transformers does not accept it as 'lfm2'"]),
        (
            {"family": "llama", "config": {"layer_typez": []}},
            ["'layer_typez' is not in the config that transformers makes of a llama"],
        ),
        ({"family": "llama", "config": {"vocab_size": 10}}, ["'vocab_size' is not for a recipe to say"]),
        ({"family": "llama", "config": {"eab": {}}}, ["'eab' is not for a recipe to say"]),
        ({"family": "llama", "config": {"num_key_value_heads": 3}}, ["3 key/value heads do not divide 4"]),
        ({"family": "llama", "config": {"num_hidden_layers": 3}}, ["its num_hidden_layers is 3 and not 4"]),
        ({"family": "gpt2", "config": {"n_embd": 64}}, ["its hidden_size is 64 and not 128"]),
        ({"family": "dbrx"}, ["pretrain.model: dbrx: "]),
        ({"family": "gpt2", "config": {"n_positions": 4}}, ["its max_position_embeddings is 4, and texts"]),
        ({"family": "gpt2", "config": {"attn_pdrop": 0.5}}, ["'attn_pdrop' is not for a recipe to say"]),
        ({"family": "llama", "config": {"num_attention_heads": 8}}, ["its num_attention_heads is 8 and not 4"]),
    ],
)
def test_a_family_that_cannot_be_trained(model: dict, fragments: list[str], text: Path, tmp_path: Path) -> None:
    settings = FromScratch.model_validate({"surgery": 1, "pretrain": {**SMALL, "model": model}})
    with pytest.raises(SurgeryError) as caught:
        pretrain(settings, tmp_path / "out", text=[text])
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert not (tmp_path / "out").exists()
