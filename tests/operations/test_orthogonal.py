"""Hadamard matrices are what they are called, and rotations are orthogonal, seeded, and fix 1 where they have to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.operations.orthogonal import hadamard, rotation_matrix

# Hidden sizes and head dims of real models: 2^k times a size of Paley's first or second kind.
SIZES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 48, 60, 64, 72, 76, 80, 96, 128, 160, 192, 256, 576, 768, 896)
NONE = (3, 6, 30, 50, 92, 100, 210)  # no multiple of 4, or only by constructions left out


def is_orthogonal(matrix: torch.Tensor) -> bool:
    return torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_matrices_are_signs_and_orthogonal(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.dtype == torch.float64 and torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    assert bool((matrix[:, 0] == 1).all())


@pytest.mark.parametrize("n", [1152, 1536, 1600, 2048, 2304, 2560, 3072, 3584])
def test_there_is_one_for_the_widths_of_real_models(n: int) -> None:
    matrix = hadamard(n)
    assert torch.equal(matrix[:, :8].T @ matrix, n * torch.eye(n, dtype=torch.float64)[:8])


@pytest.mark.parametrize("n", NONE)
def test_sizes_without_a_construction_have_none(n: int) -> None:
    assert hadamard(n) is None


@given(st.integers(1, 140))
def test_what_is_given_is_a_hadamard_matrix(n: int) -> None:
    matrix = hadamard(n)
    if matrix is not None:
        assert matrix.shape == (n, n) and torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@given(st.integers(2, 70), st.sampled_from(["hadamard", "random"]), st.integers(0, 3), st.booleans())
def test_rotations_are_orthogonal_and_fix_one(n: int, kind: str, seed: int, fixing: bool) -> None:
    matrix = rotation_matrix(n, kind, seed, fixing)
    assert is_orthogonal(matrix) and matrix.shape == (n, n)
    if fixing:
        ones = torch.ones(n, dtype=torch.float64)
        assert torch.allclose(matrix @ ones, ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_the_seed_decides(kind: str) -> None:
    first, again, other = (rotation_matrix(32, kind, seed, fixing=False) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_one_large_channel_is_spread_evenly() -> None:
    stream = torch.zeros(576, dtype=torch.float64)
    stream[100] = 1000.0
    spread = rotation_matrix(576, "hadamard", 0, fixing=False) @ stream
    assert torch.allclose(spread.abs(), torch.full_like(spread, 1000 / 24))
    for kind, fixing in (("hadamard", True), ("random", False)):
        assert (rotation_matrix(576, kind, 0, fixing) @ stream).abs().max() < 1000 / 24 * 5
