"""Interventions: what they change and what they leave alone, in many families, and the table and audit made of them."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from helpers.families import any_model, in_tiers
from helpers.planted import DIM, LAYER, UNITS, Keep, kept, planted, planted_text
from helpers.tiny import TINY, live_of, one_thread, tiny_config, tiny_model, tiny_text

from surgery.live.edits import TouchedNothing
from surgery.live.graft import fold, grafted
from surgery.live.likelihood import Likelihood
from surgery.live.stream import stream
from surgery.live.text import Chunking, chunk, tokenize
from surgery.survey.attention import AttentionStatistics
from surgery.survey.edits import amplify, isolate, mask_first, set_massive, zero_largest, zero_median, zero_random
from surgery.survey.interventions import SinkAt, audit, plan_interventions, run_interventions
from surgery.survey.massive import MassiveActivations, MassiveMeans
from surgery.survey.neurons import SuperNeurons

DIMS = {LAYER: [DIM]}
SPIKES = [(0, 0), (0, 9), (1, 0), (2, 0)]  # where the planted text has them


def altered(change, live, text) -> tuple[Keep, int]:
    with change as touched:
        keep = kept(live, text)
    return keep, touched.count


def test_zero_changes_that_layers_massive_activations_only():
    """Zero changes the massive activations of that layer, and nothing else."""
    live = planted()
    text = planted_text()
    plain = kept(live, text)
    found, count = altered(set_massive(live, DIMS), live, text)
    expected = plain.states[LAYER].copy()
    for sequence, position in SPIKES:
        assert abs(expected[sequence, position, DIM]) > 1e5
        expected[sequence, position, DIM] = 0.0
    assert count == 4
    np.testing.assert_array_equal(found.states[LAYER], expected)
    np.testing.assert_array_equal(found.states[LAYER - 1], plain.states[LAYER - 1])
    assert np.abs(found.states[LAYER + 1][0, 0, DIM]) < 100, "the blocks behind it read the change"
    np.testing.assert_array_equal(kept(live, text).states[4], plain.states[4])


def test_only_dims_of_the_survey_are_touched():
    live = planted()
    with pytest.raises(TouchedNothing, match="massive activations to zero"):
        altered(set_massive(live, {LAYER: [DIM + 1]}), live, planted_text())


def test_at_every_layer_what_has_gone_is_not_touched_again():
    live = planted()
    every = {layer: [DIM] for layer in (2, 3, 4)}
    assert altered(set_massive(live, every), live, planted_text())[1] == 4
    means = MassiveMeans()
    stream(live, planted_text(), [means])
    assert altered(set_massive(live, every, means), live, planted_text())[1] == 12


def test_means_take_the_place_of_massive_activations():
    live = planted()
    text, means = planted_text(), MassiveMeans()
    with one_thread():
        stream(live, text, [means])
    plain = kept(live, text).states[LAYER]
    found, count = altered(set_massive(live, DIMS, means), live, text)
    expected = plain.copy()
    expected[:, 0, DIM] = plain[:, 0, DIM].mean()
    assert count == 4 and plain[:, 0, DIM].std() > 0
    np.testing.assert_allclose(found.states[LAYER], expected, rtol=1e-12)


def zeroed(plain: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(N, T, d) bool; every other entry is untouched."""
    where = (found == 0) & (plain != 0)
    np.testing.assert_array_equal(found[~where], plain[~where])
    return where


def test_random_control_takes_as_many_others_and_repeats_by_seed():
    live = planted()
    text = planted_text()
    plain = kept(live, text).states[LAYER]
    chosen = []
    for seed in (0, 0, 1):
        found, count = altered(zero_random(live, DIMS, seed), live, text)
        where = zeroed(plain, found.states[LAYER])
        assert count == 4 and np.all(where.sum(axis=(1, 2)) <= [2, 1, 1]) and where.sum() >= 3  # some are zero before
        assert not any(where[sequence, position, DIM] for sequence, position in SPIKES)
        chosen.append(where)
    assert np.array_equal(chosen[0], chosen[1]) and not np.array_equal(chosen[0], chosen[2])


def test_median_control_takes_those_nearest_to_the_median():
    live = planted()
    text = planted_text()
    plain = kept(live, text).states[LAYER]
    found, count = altered(zero_median(live, DIMS), live, text)
    where = zeroed(plain, found.states[LAYER])
    assert count == 4 and where.sum(axis=(1, 2)).tolist() == [2, 1, 1]
    for states, chosen in zip(np.abs(plain), where, strict=True):
        distance = np.abs(states - np.sort(states.ravel())[(states.size - 1) // 2])
        assert distance[chosen].max() <= distance[~chosen].min()


@pytest.mark.parametrize("layer", [0, 3])
def test_largest_and_amplified_entries(layer):
    model = tiny_model("gpt2")
    live, text = live_of(model), tiny_text()
    plain = kept(live, text).states[layer]
    found, count = altered(zero_largest(live, layer, 5), live, text)
    where = zeroed(plain, found.states[layer])
    assert count == 10 and where.sum(axis=(1, 2)).tolist() == [5, 5]
    for states, chosen in zip(np.abs(plain), where, strict=True):
        assert states[chosen].min() >= states[~chosen].max()
    found, count = altered(amplify(live, 6, layer, factor=3.0), live, text)
    expected = plain.copy()
    expected[:, 6] *= 3.0
    np.testing.assert_array_equal(found.states[layer], expected)
    assert count == 2 * 32


# ---- attention: what a token is hidden from cannot depend on it

OFF_SEAM = ("bloom", "falcon", "mpt", "gptj", "gpt_neo", "codegen", "openai-gpt")


@pytest.mark.parametrize("model_type", in_tiers([*TINY, *OFF_SEAM]))
def test_no_token_depends_on_what_is_hidden_from_it(model_type):
    model = any_model(model_type)
    live, text = live_of(model), tiny_text()
    others = text.clone()
    others[:, 0] = (others[:, 0] - 3 + 40) % 90 + 3
    close = 1e-5 if model_type in OFF_SEAM else 1e-9  # some of these take their own softmax in float32
    with one_thread(), torch.inference_mode():
        plain, moved = model(text).logits, model(others).logits
        assert (plain - moved)[:, 1].abs().max() > 1e-6
        with mask_first(live) as touched:
            masked, same = model(text).logits, model(others).logits
        torch.testing.assert_close(masked[:, 1:], same[:, 1:], atol=1e-12, rtol=0)
        torch.testing.assert_close(masked[:, 0], plain[:, 0], atol=close, rtol=0)  # which sees itself as before
        assert touched.count > 0
        others = text.clone()
        others[:, 2:6] = (others[:, 2:6] - 3 + 40) % 90 + 3
        with isolate(live, 6):
            alone, same = model(text).logits, model(others).logits
        torch.testing.assert_close(alone[:, 6], same[:, 6], atol=1e-12, rtol=0)
        torch.testing.assert_close(alone[:, :6], plain[:, :6], atol=close, rtol=0)
        assert (alone - same)[:, 7].abs().max() > 1e-6, "later tokens still see those that were hidden"
        torch.testing.assert_close(model(text).logits, plain, atol=0, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "bloom", "gpt_neo"])
def test_what_looks_at_attention_sees_the_masks(model_type):
    """A pass brings these families onto the seam, where another implementation asks for masks."""
    model = any_model(model_type)
    live, text = live_of(model), tiny_text()
    scores = []
    for change in (contextlib.nullcontext(), mask_first(live)):
        statistics = AttentionStatistics()
        with one_thread(), change:
            stream(live, text, [statistics])
        scores.append(np.array([row["sink_score"] for row in statistics.rows().values()]))
    assert np.all(scores[0] > 0.025 / 2)
    np.testing.assert_allclose(scores[1] * text.shape[1], 1.0, atol=1e-6)  # the first token, which sees itself


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_masked_model_is_the_model_given_that_mask(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    live, text = live_of(model), tiny_text(2, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[1:, 0] = False
    other = torch.ones(12, 12, dtype=torch.bool).tril()
    other[4, :4] = False
    with one_thread(), torch.inference_mode():
        for change, wanted in ((mask_first(live), mask), (isolate(live, 4), other)):
            additive = torch.zeros(12, 12, dtype=torch.float64).masked_fill(~wanted, torch.finfo(torch.float64).min)
            expected = model(text, attention_mask=additive.expand(2, 1, 12, 12)).logits
            with change as touched:
                found = model(text).logits
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
            places = 2 * (78 - int(wanted.sum()))  # for both sequences, also where they share a mask
            assert touched.count == places * len(live.anatomy.sites)


def test_slots_stay_visible():
    model = tiny_model("llama")
    live, text = live_of(model), tiny_text()
    prefix = [5, 7]
    behind = torch.cat([torch.tensor([prefix]).expand(len(text), -1), text], dim=1)
    hidden = torch.ones(42, 42, dtype=torch.bool).tril()
    hidden[3:, 2] = False
    additive = torch.zeros(42, 42, dtype=torch.float64).masked_fill(~hidden, torch.finfo(torch.float64).min)
    with one_thread(), torch.inference_mode():
        expected = model(behind, attention_mask=additive.expand(2, 1, 42, 42)).logits[:, 2:]
        with grafted(live, fold(live, prefix, "as_prefix")), mask_first(live):
            found = model(text).logits
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_masks_are_put_back_even_after_an_error():
    model, text = tiny_model("llama"), tiny_text(1, 12)
    live = live_of(model)
    with one_thread(), torch.inference_mode():
        before = model(text).logits
        with pytest.raises(ZeroDivisionError), mask_first(live), isolate(live, 3):
            raise ZeroDivisionError
        assert torch.equal(model(text).logits, before)
    for change in (mask_first(live), isolate(live, 0)):
        with pytest.raises(TouchedNothing), change:
            model(tiny_text(1, 1))


def test_sink_rate_at_a_place_is_the_share_of_heads_on_it():
    """The sink rate at a place is the share of heads that look there."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 4  # sharp
    model.set_attn_implementation("eager")
    live, text = live_of(model), tiny_text(3, 20)
    with one_thread(), torch.inference_mode():
        weights = torch.stack(model(text, output_attentions=True).attentions).double().numpy()  # (L, B, H, T, T)
        for place in (0, 14, 18):
            sink = SinkAt(place)
            stream(live, text, [sink])
            scores = weights[:, :, :, place + 1 :, place].mean(axis=(1, 3))
            assert sink.rate() == pytest.approx(np.mean(scores >= 0.3))


# ---- the table


def survey_of(live, text) -> dict:
    massive, neurons = MassiveActivations(), SuperNeurons(live)
    stream(live, text, [massive, neurons])
    layers = [{"layer": layer, **row} for layer, row in massive.rows().items()]
    born = next((row["layer"] for row in layers if row["count"]), None)
    return {"layers": layers, "across": {"born": born}, "super_neurons": neurons.to_list()}


def test_the_table_of_the_planted_model():
    live = planted()
    text = planted_text(4)
    with one_thread():
        survey = survey_of(live, text)
        done = []
        planned = plan_interventions(live, text.shape[1], survey)
        rows = run_interventions(live, text, planned, lambda count, what: done.append((what, count)))
    assert sum(count for _, count in done) == len(rows) * 4 == planned.passes * 4
    assert list(dict.fromkeys(what for what, _ in done)) == list(dict.fromkeys(row["name"] for row in rows))
    by_name = {(row["name"], row["where"]): row for row in rows}
    assert len(by_name) == len(rows) == 15 and not any("error" in row for row in rows)
    untouched = rows[0]
    assert untouched["name"] == "untouched" and untouched["touched"] == 0 and untouched["massive"] == 5 * 3
    assert untouched["delta_nll"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    at_birth = [row for row in rows if row["where"] == f"layer {LAYER}"]
    assert [row["massive"] for row in at_birth] == [0, 15, 15, 15, 3]  # zero, mean, controls, MLP (token 9 is left)
    assert [row["touched"] for row in at_birth] == [5, 5, 5, 5, 4 * 32]
    assert [row["massive"] for row in rows if row["where"] == f"layer {LAYER + 1}, as a control"] == [15]
    silenced = by_name["super neurons silenced", f"layer {LAYER}, units {UNITS[0]}, {UNITS[1]}"]
    assert silenced["massive"] == 0 and silenced["touched"] == 2 * text.numel()
    with torch.inference_mode(), set_massive(live, DIMS):
        logits = live.model(text).logits.double().numpy()[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, text[:, 1:, None].numpy(), axis=-1)[..., 0]
    nll = np.log(np.exp(logits).sum(axis=-1)) - chosen
    zero = at_birth[0]
    assert zero["ppl"] == pytest.approx(math.exp(nll.mean()))
    assert zero["delta_nll"]["mean"] == pytest.approx(nll.mean() - math.log(untouched["ppl"]))
    assert zero["delta_nll"]["low"] < zero["delta_nll"]["mean"] < zero["delta_nll"]["high"]
    planted_rows = {row["name"]: row["planted"] for row in rows if "planted" in row}
    assert {name: row["position"] for name, row in planted_rows.items()} == {
        "attention to token 0 masked": 1, "token 10 isolated": 10, "token 10 amplified": 10,
    }  # fmt: skip


def test_without_massive_activations_only_sinks_can_be_moved():
    model = tiny_model("llama")
    live, text = live_of(model), tiny_text()
    with one_thread():
        survey = survey_of(live, text)
        rows = run_interventions(live, text, plan_interventions(live, text.shape[1], survey))
    assert [row["name"] for row in rows] == [
        "untouched", "attention to token 0 masked", "token 10 isolated", "token 10 amplified",
    ]  # fmt: skip
    assert plan_interventions(live, 2, survey).planned == []


def test_an_intervention_that_touches_nothing_says_so():
    """An intervention that finds nothing to touch in the model says so in its row."""
    model = tiny_model("mixtral")  # its experts are fused: no unit can be silenced by itself
    live, text = live_of(model), tiny_text()
    with one_thread():
        survey = {**survey_of(live, text), "super_neurons": [{"layer": 2, "unit": 3}]}
        rows = run_interventions(live, text, plan_interventions(live, text.shape[1], survey))
    assert [row["ppl"] is None for row in rows] == [False, True, False, False, False]
    assert "touched nothing" in rows[1]["error"] and rows[1]["name"] == "super neurons silenced"
    assert set(rows[0]) < set(rows[1])


@pytest.mark.parametrize("length, most", [(40, 64), (40, 25), (30, 1024)])
def test_audit_finds_the_smallest_number(length, most):
    """A model that knows the next token from one entry of the stream: as many must go as make perplexity ten times."""
    model = tiny_model("llama", config=tiny_config("llama", hidden_size=128, tie_word_embeddings=False))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for token in range(96):  # later tokens have the larger entry, so the last of a text goes first
            model.model.embed_tokens.weight[token, token] = 1 + token / 100
            model.lm_head.weight[token + 1, token] = 3.0
    live, text = live_of(model), torch.arange(3, 3 + length)[None]
    survey = {"layers": [{"layer": 0, "ratio": 1.0}, {"layer": 3, "ratio": 9.0}, {"layer": 4, "ratio": 2.0}]}
    with one_thread():
        found = audit(live, text, survey, most=most)
    # The last token predicts nothing; each of the others that goes costs log 97 of the mean over length - 1 targets.
    needed = 1 + math.ceil((length - 1) * math.log(10) / math.log(97))
    assert found["scalars"] == needed and found["layer"] == 3 and found["of"] == length * 128
    tried = found["tried"]
    assert tried[needed] >= 10 * tried[0] > tried[needed - 1] and max(tried) <= most
    assert tried[needed] == pytest.approx(97 ** ((needed - 1) / (length - 1)), rel=1e-3)
    with one_thread():
        assert audit(live, text, survey, most=needed - 1)["scalars"] is None


def test_the_real_model_stands_on_its_massive_activations(smollm2, wikipedia_evaluation):
    """SmolLM2: zero multiplies perplexity by more than 100, the mean and the controls leave it within one percent."""
    model, tokenizer = smollm2
    text = wikipedia_evaluation.read_text(encoding="utf-8")[:4000]
    chunks = chunk(tokenize(tokenizer, text), Chunking(4, 64), "evaluation")
    live = live_of(model)
    with one_thread():
        survey, means = survey_of(live, chunks), MassiveMeans()
    born = survey["across"]["born"]
    dims = {born: sorted({entry["dim"] for entry in survey["layers"][born]["massive"]})}

    def ppl(change=None) -> float:
        likelihood = Likelihood()
        with one_thread(), change or torch.no_grad():
            stream(live, chunks, [likelihood] if change else [likelihood, means])
        return likelihood.score.ppl

    untouched = ppl()
    assert ppl(set_massive(live, dims)) > 100 * untouched
    for change in (
        set_massive(live, dims, means),
        zero_random(live, dims),
        zero_median(live, dims),
    ):
        assert ppl(change) == pytest.approx(untouched, rel=0.01)
    found = survey["super_neurons"]
    assert found[0]["layer"] == born and sum(e["share"] for e in found if e["dim"] == found[0]["dim"]) > 0.9
