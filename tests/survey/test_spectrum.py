"""Spectra of the residual stream, against numpy's singular values of the same tensors and closed forms; the bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.families import any_model
from helpers.tiny import live_of, one_thread, tiny_text
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import DamagedCheckpoint
from surgery.live.stream import Batch, Observer, stream
from surgery.survey.spectrum import Spectrum, entropy, lower_bound, shares, upper_bound

KEYS = {"p1", "entropy_bits", "entropy_normalised", "p1_bound", "entropy_bound", "spectra", "dominance", "top3"}


class Keep(Observer):
    """Every state of a pass, by layer, as (T, d) arrays."""

    def __init__(self) -> None:
        self.states: dict[int, list[np.ndarray]] = {}

    def hidden(self, layer: int, states: torch.Tensor, batch: Batch) -> None:
        self.states.setdefault(layer, []).extend(row[batch.lead :].double().numpy().copy() for row in states)


def reference(x: np.ndarray) -> dict[str, float]:
    """The definitions word by word, from singular values and norms."""
    singular = np.linalg.svd(x, compute_uv=False)
    p = singular**2 / np.sum(x**2)
    nonzero = p[p > 1e-14]
    bits = -np.sum(nonzero * np.log2(nonzero))
    norms = np.linalg.norm(x, axis=1)
    big_m, big_r = norms[0] ** 2, np.sum(norms[1:] ** 2)
    c = big_m / big_r
    cosines = (x[1:] @ x[0]) / (norms[1:] * norms[0])
    a = np.sum(norms[1:] ** 2 * cosines**2) / big_r
    bound = (c + a) / (c + 1)
    q, r = max(bound, 1 / len(nonzero)), len(nonzero)
    return {
        "p1": p[0],
        "entropy_bits": bits,
        "entropy_normalised": bits / math.log2(min(x.shape)),
        "p1_bound": bound,
        "entropy_bound": -q * math.log2(q) - (1 - q) * math.log2(1 - q) + (1 - q) * math.log2(r - 1),
        "dominance": np.max(np.abs(x[0])) / np.mean(np.abs(x[0])),
    }


def look(*sequences: torch.Tensor, every: int = 1, lead: int = 0) -> dict:
    """What `Spectrum` says of layer 0 after these sequences (T, d), each in a batch of its own."""
    observer = Spectrum(every)
    for states in sequences:
        observer.hidden(0, states[None], Batch(torch.zeros(1, len(states), dtype=torch.long), lead))
    return observer.rows()[0]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [20, 50])  # shorter and longer than the 32 hidden dims
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "openai-gpt"])
def test_a_pass_gives_what_numpy_finds_in_the_same_states(model_type: str, length: int) -> None:
    with one_thread():
        model = any_model(model_type)
        keep, spectrum = Keep(), Spectrum(every=1)
        live = live_of(model)
        stream(live, tiny_text(3, length), [keep, spectrum], prefix=[1, 5])
    rows = spectrum.rows()
    assert sorted(rows) == [0, 1, 2, 3, 4]
    for layer, row in rows.items():
        assert set(row) == KEYS
        assert row["spectra"] == 3
        assert all(states.shape == (length, 32) for states in keep.states[layer])  # the prefix is no text
        found = [reference(states) for states in keep.states[layer]]
        for key in found[0]:
            assert row[key] == pytest.approx(np.mean([values[key] for values in found]), rel=1e-9), (layer, key)
        largest = [np.sort(np.abs(states), axis=None)[:-4:-1] for states in keep.states[layer]]
        assert row["top3"] == pytest.approx(np.mean(largest, axis=0).tolist(), rel=1e-6)


def test_spectra_are_of_every_kth_sequence_the_rest_of_all() -> None:
    """Spectra are taken of every k-th sequence, the other figures of all."""
    sequences = [gaussian(9, 6, seed) * (1 + seed) for seed in range(7)]
    row = look(*sequences, every=3)
    chosen = [reference(sequences[index].numpy()) for index in (0, 3, 6)]
    everyone = [reference(states.numpy()) for states in sequences]
    assert row["spectra"] == 3
    assert row["p1"] == pytest.approx(np.mean([values["p1"] for values in chosen]))
    assert row["p1_bound"] == pytest.approx(np.mean([values["p1_bound"] for values in chosen]))  # so that p1 exceeds it
    assert row["dominance"] == pytest.approx(np.mean([values["dominance"] for values in everyone]))
    assert row["top3"][0] == pytest.approx(np.mean([states.abs().max() for states in sequences]))


def test_the_batch_size_changes_nothing() -> None:
    states = torch.stack([gaussian(8, 5, seed) for seed in range(5)])
    together = Spectrum(every=2)
    together.hidden(0, states, Batch(torch.zeros(5, 8, dtype=torch.long), 0))
    assert together.rows()[0] == look(*states, every=2)


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_a_count(every: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Spectrum(every)


def test_a_long_first_row_over_an_even_rest_has_the_closed_form() -> None:
    """x_0 = 10 e_0, x_i = e_i: both bounds are reached."""
    states = torch.diag(torch.tensor([10.0, 1, 1, 1, 1]))
    p = 100 / 104
    bits = -p * math.log2(p) - 4 * (1 / 104) * math.log2(1 / 104)
    row = look(states)
    assert row["p1"] == pytest.approx(p, rel=1e-12)
    assert row["p1_bound"] == pytest.approx(p, rel=1e-12)
    assert row["entropy_bits"] == pytest.approx(bits, rel=1e-12)
    assert row["entropy_bound"] == pytest.approx(bits, rel=1e-12)
    assert row["entropy_normalised"] == pytest.approx(bits / math.log2(5), rel=1e-12)
    assert row["dominance"] == pytest.approx(5.0)
    assert row["top3"] == [10.0, 1.0, 1.0]


matrices = st.tuples(
    st.integers(2, 14),
    st.integers(1, 14),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-6, 0.3, 1.0, 5.0, 1e3, 1e6]),  # length of the first row
    st.integers(1, 14),  # rank of the rest, at most
    st.floats(0, 1),  # how much of the rest is repeated rows
)


@given(matrices)
def test_bounds_hold(drawn: tuple) -> None:
    rows, columns, seed, first, rank, repeated = drawn
    states = gaussian(rows, rank, seed) @ gaussian(rank, columns, seed + 1)
    states[0] *= first
    states[1 : 1 + int(repeated * (rows - 1))] = states[-1].clone()
    p = shares(states)
    bound = lower_bound(states)
    assert p.sum().item() == pytest.approx(1)
    assert (p >= 0).all() and (p.diff() <= 0).all()
    assert bound <= p[0] + 1e-12
    size = int(torch.count_nonzero(p))
    assert size <= min(rows, columns, rank)
    assert entropy(p) <= upper_bound(bound, size) + 1e-9
    assert entropy(p) <= math.log2(size) + 1e-9


@pytest.mark.parametrize(("rows", "columns"), [(12, 9), (9, 12), (40, 40)])
def test_rounding_is_no_direction(rows: int, columns: int) -> None:
    assert torch.count_nonzero(shares(gaussian(rows, 3) @ gaussian(3, columns, 1))) == 3


@given(matrices, st.sampled_from([1e-160, 1e-3, 1e3, 1e160]))
def test_no_share_depends_on_the_scale(drawn: tuple, scale: float) -> None:
    rows, columns, seed, first, *_ = drawn
    states = gaussian(rows, columns, seed)
    states[0] *= first
    torch.testing.assert_close(shares(states * scale), shares(states), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lower_bound(states * scale), lower_bound(states), rtol=1e-9, atol=1e-12)


def test_a_bound_below_one_over_rank_says_no_more_than_rank() -> None:
    """The formula at p < 1 / r would give less than log r, and an even spectrum has log r."""
    states = torch.cat([torch.zeros(1, 4), torch.eye(4)])
    row = look(states)
    assert row["p1_bound"] == 0
    assert row["entropy_bits"] == pytest.approx(2)
    assert row["entropy_bound"] == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spike", [1e2, 1e4, 1e6])
def test_precision_under_a_massive_activation(dtype: torch.dtype, spike: float) -> None:
    """Up to s_1^2 / s_r^2 = 1e13: entropy to 1e-10 bits of what the stored values have."""
    states = gaussian(64, 48).to(dtype)
    states[0, 7] = spike
    row = look(states)
    values = reference(states.double().numpy())
    assert row["p1"] == pytest.approx(values["p1"], rel=1e-12)
    assert row["entropy_bits"] == pytest.approx(values["entropy_bits"], abs=1e-10)
    assert row["top3"][0] == states[0, 7].abs().item()


def test_one_token_is_one_direction() -> None:
    row = look(gaussian(1, 6))
    assert (row["p1"], row["p1_bound"]) == pytest.approx((1, 1))
    assert (row["entropy_bits"], row["entropy_normalised"], row["entropy_bound"]) == (0, 0, 0)
    assert math.copysign(1, row["entropy_bits"]) == 1  # a survey shows 0, not -0


def test_a_stream_of_zeros_has_no_spectrum() -> None:
    row = look(torch.zeros(4, 2))
    assert row["spectra"] == 0
    assert row["p1"] is row["entropy_bits"] is row["entropy_bound"] is None
    assert (row["top3"], row["dominance"]) == ([0, 0, 0], 0)


def test_fewer_than_three_entries() -> None:
    assert look(torch.tensor([[3.0], [-4.0]]))["top3"] == [4, 3, 0]


def test_largest_entries_may_share_a_token_and_are_magnitudes() -> None:
    states = gaussian(20, 10).clamp(-2, 2)
    states[4, 2], states[4, 3], states[9, 0] = -50.0, 40.0, 45.0
    assert look(states)["top3"] == [50, 45, 40]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    states = gaussian(6, 4)
    states[3, 1] = value
    with pytest.raises(DamagedCheckpoint, match="layer 0: .*not finite.*float32"):
        look(states, every=5)
