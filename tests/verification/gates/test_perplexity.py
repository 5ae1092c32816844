"""Perplexity, paired intervals, massive activations and sink scores against plain references."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.measured import Told, measured
from helpers.tiny import live_of, tiny_config, tiny_model, tiny_text
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.live import port as port_module
from surgery.live.graft import fold, grafted
from surgery.live.likelihood import Likelihood, scored
from surgery.live.paired import Score, mean_interval, paired, student_t
from surgery.live.stream import Batch, stream
from surgery.steps.measure import Measuring, is_exact
from surgery.steps.recipe import parse_recipe
from surgery.survey.attention import SINK_SCORE, AttentionStatistics
from surgery.survey.massive import MassiveActivations, massive
from surgery.verification.gates.agreement import Agreement
from surgery.verification.gates.base import at_least, at_most
from surgery.verification.gates.perplexity import Perplexity
from surgery.verification.verdict import judged
from surgery.verification.verify import Verify

PREFIX = (5, 7)
nlls = st.floats(0, 1e4, allow_nan=False)


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama", torch.float64)
    return live_of(model)


# ---- scores and intervals


@given(st.lists(nlls, min_size=1, max_size=20), st.integers(1, 500))
def test_perplexity_is_the_exponential_of_the_mean_over_tokens(chunks: list[float], targets: int) -> None:
    score = Score(tuple(chunks), targets)
    assert score.tokens == len(chunks) * targets
    assert math.isclose(score.nll, np.sum(chunks, dtype=np.longdouble) / score.tokens, rel_tol=1e-12, abs_tol=1e-300)
    assert math.isclose(math.log(score.ppl), score.nll, rel_tol=1e-9, abs_tol=1e-9) if score.nll < 700 else True
    assert score.to_dict() == {"ppl": score.ppl, "nll": score.nll, "tokens": score.tokens}


def test_a_perplexity_beyond_floats_is_infinite_not_an_error() -> None:
    assert Score((1e6,), 1).ppl == math.inf


@given(st.lists(st.tuples(nlls, nlls), min_size=2, max_size=20), st.integers(1, 500))
def test_paired_differences_are_antisymmetric_and_centred(pairs: list[tuple[float, float]], targets: int) -> None:
    a, b = (Score(chunks, targets) for chunks in zip(*pairs, strict=True))
    there, back = paired(a, b), paired(b, a)
    assert there.low <= there.mean <= there.high
    assert math.isclose(there.mean, a.nll - b.nll, rel_tol=1e-9, abs_tol=1e-9)
    for x, y in ((there.mean, back.mean), (there.low, back.high), (there.high, back.low)):
        assert math.isclose(x, -y, rel_tol=1e-9, abs_tol=1e-12)


@given(st.lists(nlls, min_size=2, max_size=20), st.floats(-5, 5))
def test_a_difference_that_is_the_same_in_every_chunk_is_certain(chunks: list[float], shift: float) -> None:
    """What pairing is for: chunks differ wildly, the difference does not."""
    found = paired(Score(tuple(value + shift for value in chunks), 1), Score(tuple(chunks), 1))
    assert abs(found.mean - shift) < 1e-8 and found.high - found.low < 1e-8


def test_the_interval_is_students() -> None:
    values = [0.3, -0.1, 0.4, 0.0, 0.2]
    found = mean_interval(values)
    margin = 2.776 * np.std(values, ddof=1) / math.sqrt(5)  # t table: 4 degrees of freedom, two-sided 95%
    assert math.isclose(found.high - found.mean, margin, rel_tol=1e-3)
    assert math.isclose(found.mean - found.low, margin, rel_tol=1e-3)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(0).normal(1.0, 2.0, (4000, 8))
    covered = np.mean([found.low <= 1.0 <= found.high for found in map(mean_interval, drawn.tolist())])
    assert abs(covered - 0.95) < 0.01


def test_one_chunk_bounds_nothing() -> None:
    found = mean_interval([0.1])
    assert (found.low, found.high) == (-math.inf, math.inf)


TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 63: 1.9983, 1000: 1.9623}


@pytest.mark.parametrize("freedom", TABLE)
def test_student_t_is_that_of_the_tables(freedom: int) -> None:
    assert abs(student_t(freedom) - TABLE[freedom]) < (5e-3 if 3 <= freedom < 10 else 6e-4)


def test_student_t_falls_towards_the_normal_quantile() -> None:
    values = [student_t(freedom) for freedom in range(1, 200)]
    assert all(a > b > 1.95996 for a, b in zip(values, values[1:], strict=False))


def test_scores_on_different_tokens_cannot_be_paired() -> None:
    for other in (Score((1.0, 2.0, 3.0), 4), Score((1.0, 2.0), 5)):
        with pytest.raises(ValueError, match="same chunks"):
            paired(Score((1.0, 2.0), 4), other)


# ---- gates

LIMITS = parse_recipe(
    "surgery: 1\noperations: [attention_bias: {prefix: [1]}]\n"
    "verify: {equivalence: {max_delta_nll: 0.01}, perplexity: {max_ratio: 1.1}, massive_activations: {max: 2}}\n",
    "test",
)


def gates(converted: tuple[float, ...], bare=(2.0, 3.0, 4.0), control=None, massive_count: int = 0) -> dict[str, bool]:
    original = measured(9, bare=Score(bare, 1), control=Score(converted if control is None else control, 1))
    after = measured(massive_count, converted=Score(converted, 1))
    return {found.name: found.passed for found in judged(LIMITS.verify.gates(), original, after, exact=True)}


def test_gates_hold_where_everything_is_the_same() -> None:
    assert gates((2.0, 3.0, 4.0)) == {"equivalence": True, "perplexity": True, "massive_activations": True}


def test_a_gate_looks_at_the_interval_not_at_the_point() -> None:
    noisy = (1.0, 3.0, 5.0)  # the mean is the bare original's to the last bit, and says nothing
    assert paired(Score(noisy, 1), Score((2.0, 3.0, 4.0), 1)).mean == 0
    assert gates(noisy)["perplexity"] is False
    assert gates((2.0, 3.0, 4.0), control=noisy)["equivalence"] is False
    assert gates((2.0, 3.0, 4.0), control=(2.5, 3.5, 4.5))["equivalence"] is False  # better is wrong too


def test_which_gates_apply_to_which_recipe() -> None:
    """Equivalence is asked of recipes that change no function, perplexity of all."""

    def asked(gate: str) -> list[str]:
        recipe = parse_recipe(f"surgery: 1\noperations: [head_norm: {{gate: {gate}}}]\n", "test")
        score, exact = Score((2.0, 3.0), 1), is_exact(recipe, tiny_config("llama"), 99)
        original, after = measured(bare=score, control=score), measured(converted=score)
        return [found.name for found in judged(recipe.verify.gates(), original, after, exact)]

    assert asked("0") == ["equivalence", "perplexity", "massive_activations"]
    assert asked("0.1") == asked("1") == ["perplexity", "massive_activations"]


WINDOWS = {"mistral": 8, "gemma2": 8, "llama4_text": 16, "llama": None, "qwen2": None}


@pytest.mark.parametrize("family", WINDOWS)
def test_slots_always_visible_are_exact_within_the_window(family: str) -> None:
    """Slots that every query sees are exact as far as the window reaches."""

    def exact(visible: str, length: int) -> bool:
        text = f"surgery: 1\noperations: [attention_bias: {{prefix: [5, 7], slots_visible: {visible}}}]\n"
        return is_exact(parse_recipe(text, "test"), tiny_config(family), length + 2)

    window = WINDOWS[family]
    assert exact("as_prefix", 999)
    if window is None:
        assert exact("always", 999)
    else:
        assert exact("always", window - 2) and not exact("always", window - 1)


def test_gates_at_their_limits() -> None:
    shift = math.log(1.1)
    assert gates(tuple(value + shift - 1e-9 for value in (2.0, 3.0, 4.0)))["perplexity"] is True
    assert gates(tuple(value + shift + 1e-9 for value in (2.0, 3.0, 4.0)))["perplexity"] is False
    assert gates((2.0, 3.0, 4.0), massive_count=2)["massive_activations"] is True
    assert gates((2.0, 3.0, 4.0), massive_count=3)["massive_activations"] is False


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_gate_passes_on_what_is_not_a_number(value: float) -> None:
    assert at_most("x", value, 1e308).passed is False
    assert at_least("x", math.nan, -1e308).passed is False and at_least("x", -value, -1e308).passed is False
    found = gates((value, 3.0, 4.0))
    assert found == {"equivalence": False, "perplexity": False, "massive_activations": False}


def test_without_the_original_only_what_needs_none_is_judged() -> None:
    for nll, passed in ((1.0, True), (math.nan, False)):
        found = judged(LIMITS.verify.gates(), None, measured(converted=Score((nll,), 1)), exact=True)
        assert [(judgement.name, judgement.passed) for judgement in found] == [("massive_activations", passed)]


def test_a_minimum_says_that_it_is_one() -> None:
    """And a limit that is a maximum has the keys that it always had."""
    assert at_least("x", 0.98, 0.98).to_dict() == {
        "name": "x", "passed": True, "value": 0.98, "limit": 0.98, "minimum": True,
    }  # fmt: skip
    assert at_least("x", 0.97, 0.98).passed is False
    assert at_most("x", 1.0, 1.0).to_dict() == {"name": "x", "passed": True, "value": 1.0, "limit": 1.0}


# ---- likelihood


class Begins:
    """Of a tokenizer, what the original is measured with."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos


def test_likelihood_is_the_loss_of_transformers(llama) -> None:
    live = llama
    chunks = tiny_text(rows=3, length=24)
    found = scored(live, chunks)
    with torch.no_grad():
        losses = [live.model(input_ids=row[None], labels=row[None]).loss.item() for row in chunks]
    assert found.targets == 23
    assert np.allclose(np.array(found.chunks) / 23, losses, rtol=1e-6)


def test_behind_a_prefix_the_same_tokens_are_scored(llama) -> None:
    live = llama
    chunks = tiny_text(rows=2, length=16)
    found = scored(live, chunks, prefix=PREFIX)
    behind = torch.cat([torch.tensor([PREFIX, PREFIX]), chunks], dim=1)
    labels = behind.clone()
    labels[:, : len(PREFIX) + 1] = -100  # neither the prefix nor the first token of the text
    with torch.no_grad():
        losses = [
            live.model(input_ids=a[None], labels=b[None]).loss.item() for a, b in zip(behind, labels, strict=True)
        ]
    assert found.targets == 15
    assert np.allclose(np.array(found.chunks) / 15, losses, rtol=1e-6)


def test_the_baselines_are_what_they_are_called(llama) -> None:
    live = llama
    chunks = tiny_text(rows=2, length=16)

    def original(prefix: tuple[int, ...], bos: int | None, passes: int):
        told = Told()
        found = Measuring(chunks, None, Verify().gates(), told).original(live, prefix, Begins(bos), None)
        assert len(told.seen) == told.total == passes * 2  # what is read after the same tokens is read once
        return found

    found = original(PREFIX, 1, 3)
    assert found.scores["bare"] == scored(live, chunks)
    assert found.scores["bos"] == scored(live, chunks, prefix=(1,))
    assert found.scores["control"] == scored(live, chunks, prefix=PREFIX)
    assert list(found.watched["massive_activations"]) == ["bare"]
    same = original((1,), 1, 2).scores
    assert same["bos"] == same["control"] == found.scores["bos"] != same["bare"]
    unfolded = original((), 1, 2).scores
    assert unfolded["control"] == unfolded["bare"] == found.scores["bare"] != unfolded["bos"]
    assert set(original(PREFIX, None, 2).scores) == {"bare", "control"}


def test_what_stands_beside_is_read_on_a_part_of_the_text(llama) -> None:
    """Each fourth chunk of many, where no gate watches it; and is compared on these."""
    chunks = tiny_text(rows=72, length=8)
    measuring = Measuring(chunks, None, Verify().gates(), Told())
    found = measuring.original(llama, PREFIX, Begins(1), None)
    assert {name: len(score.chunks) for name, score in found.scores.items()} == {"bare": 72, "control": 18, "bos": 18}
    assert found.scores["control"] == scored(llama, chunks[:18], prefix=PREFIX)
    with grafted(llama, fold(llama, PREFIX, "as_prefix")):
        after = measuring.converted(llama, Begins(1), None)
    judged = {one.name: one for gate in Verify().gates() for one in gate.judge(found, after)}
    assert judged["equivalence"].value < 1e-12
    verdict = Perplexity().found(found, after, None)
    beside, bare = verdict["perplexity"]["bos"], scored(llama, chunks[:18])
    assert (
        beside["bare_nll"] == bare.nll
        and beside["tokens"] == 18 * 7
        and "bare_nll" not in verdict["perplexity"]["bare"]
    )
    rows = {row[0]: row for row in Perplexity.table({**verdict, "prefix": {}}).rows}
    assert rows["original + BOS"][4] == f"{math.exp(beside['nll'] - bare.nll):.3f}"
    watching = Measuring(chunks, None, [*Verify().gates(), Agreement(min_share=0.5)], Told())
    assert len(watching.original(llama, PREFIX, Begins(1), None).scores["control"].chunks) == 72


def test_how_rows_are_batched_changes_nothing(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    live = llama
    chunks = tiny_text(rows=5, length=12)
    before, after = MassiveActivations(), MassiveActivations()
    whole = scored(live, chunks, observers=[before])
    monkeypatch.setattr(port_module, "LOGIT_BYTES", 4 * 97 * 12 * 2)  # two rows at a time
    parts = scored(live, chunks, observers=[after])
    assert np.allclose(whole.chunks, parts.chunks, rtol=1e-12)
    assert before.summary() == after.summary() and before.layers


# ---- massive activations


def by_definition(states: np.ndarray) -> tuple[np.ndarray, float]:
    """Sun's criterion in plain numpy; of an even count of entries the lower of the two in the middle is the median."""
    flat = np.sort(np.abs(states).ravel())
    median = flat[(flat.size - 1) // 2]
    return (np.abs(states) >= 100) & (np.abs(states) >= 1000 * median), median


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_massive_is_suns_criterion(tokens: int, dims: int, seed: int, scale: float) -> None:
    source = np.random.default_rng(seed)
    states = source.normal(0, 10**scale, (tokens, dims)) * 10 ** source.choice([0, 0, 0, 2, 4], (tokens, dims))
    states = states.astype(np.float32)
    places, median = massive(torch.from_numpy(states))
    expected, middle = by_definition(states)
    assert np.array_equal(places.numpy(), np.argwhere(expected)) and median.item() == middle


BOUNDARIES = [
    (100.0, 0.0625, True),
    (-100.0, 0.0625, True),
    (np.nextafter(np.float32(100), np.float32(0)), 0.0625, False),  # large against the median, and too small
    (2000.0, 2.0, True),
    (np.nextafter(np.float32(2000), np.float32(0)), 2.0, False),  # large, and too near the median
]


@pytest.mark.parametrize(("value", "median", "expected"), BOUNDARIES)
def test_the_bounds_of_massive_belong_to_it(value: float, median: float, expected: bool) -> None:
    states = torch.full((3, 5), median)
    states[1, 2] = float(value)
    places, found = massive(states)
    assert places.tolist() == ([[1, 2]] if expected else [])
    assert found.item() == median


def test_massive_activations_name_their_tokens_but_no_prefix() -> None:
    """The tokens that carry massive activations are named. A prefix is not counted."""
    states = torch.full((1, 4, 6), 0.5)
    states[0, 0, 5] = 9e9  # in the prefix
    states[0, 2, 3] = -1000.0
    states[0, 3, 3] = 600.0
    seen = MassiveActivations()
    seen.hidden(4, states, Batch(torch.tensor([[50, 51, 52, 53]]), lead=1))
    assert seen.summary() == {
        "count": 2, "worst_ratio": 2000.0, "dims": [3], "layers": [4], "token_ids": [52, 53],
    }  # fmt: skip
    row = seen.rows()[4]
    assert row["max"] == 1000.0 and row["median"] == 0.5 and row["count"] == 2
    assert row["massive"][0] == {"dim": 3, "position": 1, "token": 52, "value": -1000.0}


def test_layers_are_seen_once_as_output_hidden_states(llama) -> None:
    """Every layer is seen once, and its states are those of `output_hidden_states`."""
    live = llama
    chunks = tiny_text(rows=2, length=12)
    seen = MassiveActivations()
    stream(live, chunks, [seen])
    with torch.no_grad():
        states = live.model(input_ids=chunks, output_hidden_states=True).hidden_states
    rows = seen.rows()
    assert sorted(rows) == list(range(5))
    for layer in range(4):  # transformers' last entry is behind the final norm, which is not a layer
        expected = states[layer].abs().amax(dim=(1, 2)).mean().item()
        assert math.isclose(rows[layer]["max"], expected, rel_tol=1e-6)
        assert math.isclose(rows[layer]["first_norm"], states[layer][:, 0].norm(dim=-1).mean().item(), rel_tol=1e-5)


# ---- sinks


def eager_attention(model, chunks: torch.Tensor) -> list[torch.Tensor]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return list(model(input_ids=chunks, output_attentions=True).attentions)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_sink_scores_are_eager_attention_to_position_0(kind: str) -> None:
    """Plain, windowed, soft-capped, and with learned sink logits."""
    model = tiny_model(kind, torch.float32)
    live, chunks = live_of(model), tiny_text(rows=2, length=30)
    seen = AttentionStatistics()
    stream(live, chunks, [seen])
    for block, weights in enumerate(eager_attention(model, chunks)):
        expected = weights[..., 0].double().mean(dim=(0, 2))
        assert np.allclose(seen.rows()[block + 1]["sink_score"], expected, atol=1e-5)
        share = (expected >= SINK_SCORE).double().mean().item()
        row = seen.rows()[block + 1]
        assert math.isclose(row["sink_rate"], share) and row["slot_score"] == [[]] * 4


def test_with_slots_what_they_take_is_what_the_text_lacks() -> None:
    model = tiny_model("llama", torch.float32)
    live, chunks = live_of(model), tiny_text(rows=2, length=30)
    folded, seen = fold(live, PREFIX, "as_prefix"), AttentionStatistics()
    with grafted(live, folded):
        stream(live, chunks, [seen])
        model.config._attn_implementation_internal = "eab_eager"
        with torch.no_grad():
            attentions = model(input_ids=chunks, output_attentions=True).attentions
    behind = torch.cat([torch.tensor([PREFIX, PREFIX]), chunks], dim=1)
    control = eager_attention(model, behind)
    for block, weights in enumerate(attentions):
        row = seen.rows()[block + 1]
        assert np.allclose(row["sink_score"], weights[..., 0].double().mean(dim=(0, 2)), atol=1e-5)
        assert np.allclose(np.sum(row["slot_score"], axis=1), 1 - weights.double().sum(-1).mean(dim=(0, 2)), atol=1e-5)
        expected = control[block][:, :, len(PREFIX) :, : len(PREFIX)].double().mean(dim=(0, 2))
        assert np.allclose(row["slot_score"], expected, atol=1e-5)  # each slot takes what its token took
        assert row["sink_rate"] == np.mean(np.max(np.c_[row["sink_score"], row["slot_score"]], axis=1) >= SINK_SCORE)


def test_observers_ask_for_no_more_than_they_use() -> None:
    assert Likelihood.wants("logits") and not Likelihood.wants("hidden") and not Likelihood.wants("attention")
    assert AttentionStatistics.wants("attended") and MassiveActivations.wants("hidden")
    assert replace(Batch(torch.zeros(1, 1), 0), lead=1).lead == 1
