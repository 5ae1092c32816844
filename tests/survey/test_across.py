"""What the layers say together: lives of massive activations, phases, correlations, the scale-free criterion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.families import in_tiers
from helpers.tiny import TINY, live_of, one_thread, tiny_model, tiny_text
from hypothesis import given
from hypothesis import strategies as st

from surgery.live.stream import Batch, Observer, stream
from surgery.survey.across import AutoMassive, across, alive, auto_massive, correlations, phases
from surgery.survey.massive import MassiveActivations, massive
from surgery.survey.spectrum import Spectrum

DEPTH = 12


def row(layer: int, **changes) -> dict:
    plain = {
        "layer": layer, "count": 0, "dims": [], "tokens": [], "auto_count": 0, "first_norm": 10.0, "rest_norm": 10.0,
        "entropy_bits": 6.0, "sink_rate": None if layer == 0 else 0.0,
    }  # fmt: skip
    return {**plain, **changes}


def spiked(start: int = 3, stop: int = 9, depth: int = DEPTH) -> list[dict]:
    """A first token of norm 1000 and a valley of entropy in layers start..stop; blocks that read them have sinks."""
    layers = [row(layer) for layer in range(depth)]
    for layer in range(start, stop + 1):
        layers[layer].update(
            count=8, auto_count=8, dims=[[5, 8]], tokens=[["a", 8]], first_norm=1000.0, entropy_bits=0.5
        )
        if layer + 1 < depth:
            layers[layer + 1]["sink_rate"] = 0.8
    return layers


def planted(seed: int = 0, rows: int = 40, columns: int = 24) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_birth_death_dims_and_tokens() -> None:
    layers = spiked(3, 9)
    layers[9].update(dims=[[5, 8], [7, 60]], tokens=[["a", 8], ["b", 1]])
    found = across(layers)
    assert (found["born"], found["died"], found["spans"]) == (3, 10, [[3, 9]])
    assert (found["dims"], found["tokens"]) == ([7, 5], ["a", "b"])
    assert found["auto"] == {"born": 3, "died": 10, "spans": [[3, 9]]}


def test_what_lives_in_the_last_layer_has_not_died() -> None:
    found = across(spiked(3, DEPTH - 1))
    assert (found["born"], found["died"]) == (3, None)


def test_nothing_born_nothing_died() -> None:
    found = across([row(layer) for layer in range(DEPTH)])
    assert (found["born"], found["died"], found["spans"], found["dims"], found["tokens"]) == (None, None, [], [], [])
    assert found["phases"] is None


def test_an_odd_sequence_moves_nothing_and_a_gap_is_seen() -> None:
    assert alive([0, 1, 0, 64, 64, 64, 0, 60, 1]) == [(3, 5), (7, 7)]
    assert alive([0, 0, 2, 1]) == [(2, 3)]  # few in all are still some
    assert alive([8, 32, 8, 8, 8, 7]) == [(0, 5)]  # spikes of four dims at birth do not hide the rest


def test_what_only_an_odd_sequence_had_is_not_listed() -> None:
    layers = spiked()
    layers[1].update(count=1, massive=[{"dim": 99, "position": 3, "token": "odd", "value": 101.0}])
    assert across(layers)["dims"] == [5]


def test_auto_is_left_out_where_it_was_not_counted() -> None:
    layers = spiked()
    for entry in layers:
        del entry["auto_count"]
    assert across(layers)["auto"] is None


@given(st.integers(1, 6), st.integers(6, DEPTH - 1))
def test_phases_cover_the_depth(start: int, stop: int) -> None:
    found = phases(spiked(start, stop))
    assert found["mix"] == [0, start - 1]
    assert found["compress"] == [start, stop]
    assert found["refine"] == (None if stop == DEPTH - 1 else [stop + 1, DEPTH - 1])


def test_the_boundaries_are_halfway() -> None:
    layers = spiked(3, 9)  # entropy 0.5 under 6: halfway is 3.25; norms 100 over 1: halfway in the logarithm is 10
    layers[9].update(entropy_bits=3.3)
    assert phases(layers)["compress"] == [3, 8]
    layers[9].update(entropy_bits=3.2)
    assert phases(layers)["compress"] == [3, 9]
    layers[3].update(first_norm=99.0)
    assert phases(layers)["compress"] == [4, 9]
    layers[3].update(first_norm=101.0)
    assert phases(layers)["compress"] == [3, 9]


def test_entropy_that_rises_later_moves_no_boundary() -> None:
    layers = spiked(3, 8)
    layers[8]["entropy_bits"], layers[10]["entropy_bits"] = 3.3, 9.0
    assert phases(layers)["compress"] == [3, 7]


def test_a_second_valley_is_not_joined() -> None:
    layers = spiked(5, 9)
    layers[2].update(first_norm=1000.0, entropy_bits=0.6)
    assert phases(layers)["compress"] == [5, 9]


@pytest.mark.parametrize(
    ("key", "value"),
    [("first_norm", 90.0), ("entropy_bits", 3.1), ("sink_rate", 0.0), ("sink_rate", None), ("entropy_bits", None)],
)
def test_each_of_the_three_signs_is_needed(key: str, value: float | None) -> None:
    layers = spiked()
    for entry in layers[1:]:
        if entry[key] not in (6.0, 10.0):
            entry[key] = value
    assert phases(layers) is None


def test_a_sink_is_that_of_the_block_that_reads_a_layer() -> None:
    """Blocks 0..2 read layers of Mix: sinks there, and none where the stream is compressed, are no sign of phases."""
    layers = spiked()
    for entry in layers[1:]:
        entry["sink_rate"] = 0.5 if entry["layer"] <= 3 else 0.4
    assert phases(layers) is None


@pytest.mark.parametrize("depth", [1, 2])
def test_too_few_layers_for_phases(depth: int) -> None:
    found = across([row(layer) for layer in range(depth)])
    assert found["phases"] is None and found["correlations"] is None


def test_a_stream_compressed_from_the_embedding_on_leaves_no_mix() -> None:
    layers = spiked(0, 9)
    layers[5]["entropy_bits"] = 0.4
    assert phases(layers) is None


def test_low_entropy_without_a_long_first_token_is_no_valley() -> None:
    """A stream may lose its entropy in other ways: with random weights its tokens grow alike over depth."""
    layers = spiked(3, 8)
    layers[10]["entropy_bits"] = layers[11]["entropy_bits"] = 0.1
    assert phases(layers)["compress"] == [3, 8]


@given(st.integers(0, 10**6))
def test_correlations_are_those_of_changes(seed: int) -> None:
    source = np.random.default_rng(seed)
    norms, bits, rates = source.uniform(1, 100, 8), source.uniform(0, 9, 8), source.uniform(0, 1, 7)
    layers = [row(i, first_norm=norms[i], entropy_bits=bits[i]) for i in range(8)]
    for i in range(7):
        layers[i + 1]["sink_rate"] = rates[i]  # block i reads layer i
    found = correlations(layers)
    entropy = np.corrcoef(np.diff(norms), np.diff(bits))[0, 1]
    sinks = np.corrcoef(np.diff(norms[:7]), np.diff(rates))[0, 1]
    assert found["first_norm_entropy"] == pytest.approx(entropy, abs=1e-9)
    assert found["first_norm_sink_rate"] == pytest.approx(sinks, abs=1e-9)


def test_spikes_go_against_entropy_and_with_sinks() -> None:
    found = correlations(spiked())
    assert found["first_norm_entropy"] == pytest.approx(-1)
    assert found["first_norm_sink_rate"] == pytest.approx(1)


def test_what_never_changes_has_no_correlation() -> None:
    layers = spiked()
    for entry in layers[1:]:
        entry["sink_rate"] = 0.0
    assert correlations(layers)["first_norm_sink_rate"] is None
    assert correlations([row(layer) for layer in range(DEPTH)]) is None


def test_a_layer_without_attention_is_left_out() -> None:
    layers = spiked()
    layers[6]["sink_rate"] = None
    assert correlations(layers)["first_norm_sink_rate"] == pytest.approx(1)


def test_auto_finds_the_planted_ones_and_nothing_else() -> None:
    states = planted()
    scale = np.median(np.abs(states.numpy()).max(axis=1)[:-1])
    states[0, 3], states[7, 3], states[7, 4] = 10.5 * scale, -200 * scale, 9.0 * scale
    places, ordinary = auto_massive(states)
    assert places.tolist() == [[0, 3], [7, 3]]
    peaks = np.sort(np.abs(states.numpy()).max(axis=1))
    assert ordinary.item() == peaks[(len(peaks) - 1) // 2]


@given(st.integers(0, 10**6), st.sampled_from([1e-30, 1e-3, 1e3, 1e30]), st.sampled_from([1.0, 40.0, 1e4]))
def test_auto_has_no_scale(seed: int, scale: float, spike: float) -> None:
    states = planted(seed)
    states[0, 5] = spike * 3
    places, ordinary = auto_massive(states)
    scaled, scaled_ordinary = auto_massive(states * scale)
    assert torch.equal(places, scaled)
    assert scaled_ordinary.item() == pytest.approx(ordinary.item() * scale)
    assert bool(len(places)) == (spike > 1)


def test_a_feature_that_is_large_in_most_tokens_is_not_massive() -> None:
    states = planted()
    states[:, 2] += 5000.0
    assert len(massive(states)[0])
    assert not len(auto_massive(states)[0])


@pytest.mark.parametrize("states", [torch.ones(1, 4) * 1e6, torch.zeros(6, 4), torch.eye(5)[:, :2]])
def test_no_ordinary_token_no_massive_activation(states: torch.Tensor) -> None:
    assert not len(auto_massive(states)[0])


def test_auto_counts_over_sequences_without_the_prefix() -> None:
    observer = AutoMassive()
    states = torch.stack([planted(seed) for seed in range(3)])
    states[:, 0, 0] = 1e6  # a prefix of one token, massive in every sequence
    states[1, 4, 6] = 1e4
    states[2, 4, 6] = states[2, 9, 1] = 1e4
    observer.hidden(2, states, Batch(torch.zeros(3, 40, dtype=torch.long), 1))
    ratios = []
    for sequence in states[:, 1:].float().numpy():
        peaks = np.abs(sequence).max(axis=1)
        ratios.append(peaks.max() / np.sort(peaks)[(len(peaks) - 1) // 2])
    assert observer.rows() == {2: {"auto_count": 3, "auto_ratio": pytest.approx(np.mean(ratios), rel=1e-6)}}


class SinkRates(Observer):
    """Share of heads that give position 0 at least 0.3 of their attention, by block; plain causal attention only."""

    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}

    def attention(self, block: int, call, batch: Batch) -> None:
        keys = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
        scores = call.query @ keys.transpose(2, 3) * call.scale
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)[..., 0].mean(-1)  # (B, Hq)
        self.rates.setdefault(block, []).extend((weights >= 0.3).double().mean(-1).tolist())


def survey(model, chunks: torch.Tensor) -> list[dict]:
    observers = [MassiveActivations(), Spectrum(every=1), AutoMassive()]
    sinks = SinkRates()
    stream(live_of(model), chunks, [*observers, sinks])
    tables = [observer.rows() for observer in observers]
    layers = [{"layer": layer, **tables[0][layer], **tables[1][layer], **tables[2][layer]} for layer in tables[0]]
    for layer in layers[1:]:
        layer["sink_rate"] = float(np.mean(sinks.rates[layer["layer"] - 1]))
    return layers


@pytest.mark.parametrize("model_type", in_tiers(TINY))
def test_random_weights_have_no_massive_activations_or_phases(model_type: str) -> None:
    with one_thread():
        found = across(survey(tiny_model(model_type), tiny_text(3, 80)))
    assert found["auto"] == {"born": None, "died": None, "spans": []}
    assert found["born"] is None and found["phases"] is None


@pytest.fixture(scope="module")
def real(smollm2, wikipedia_evaluation) -> list[dict]:
    """Rows of SmolLM2-135M on three chunks of 128 tokens."""
    model, tokenizer = smollm2
    ids = tokenizer(wikipedia_evaluation.read_text(encoding="utf-8")[:4000])["input_ids"][: 3 * 128]
    return survey(model, torch.tensor(ids).view(3, 128))


def test_a_real_model_has_them_all(real: list[dict]) -> None:
    found = across(real)
    assert (found["born"], found["died"], found["dims"][0]) == (12, 29, 507)
    assert found["auto"]["spans"][-1][0] == 12
    assert found["phases"]["mix"] == [0, 11]
    assert found["phases"]["compress"] == [12, 28]
    assert found["phases"]["refine"] == [29, 30]
    assert found["correlations"]["first_norm_entropy"] < -0.8
    assert found["correlations"]["first_norm_sink_rate"] > 0.3


def test_bounds_hold_on_a_stream_and_are_tight_where_compressed(real: list[dict]) -> None:
    """Bounds hold on a model's own stream, and are tight where it is compressed."""
    for layer in real:
        assert layer["p1_bound"] <= layer["p1"]
        assert layer["entropy_bits"] <= layer["entropy_bound"]
    for layer in real[12:25]:
        assert layer["p1_bound"] > 0.999 * layer["p1"]
        assert layer["entropy_bound"] < layer["entropy_bits"] + 0.5
