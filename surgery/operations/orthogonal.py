"""Random orthogonal matrices: Hadamard's, with random signs, where there is one of the size."""

from __future__ import annotations

import math

import torch

TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def hadamard(n: int) -> torch.Tensor | None:
    """A Hadamard matrix (n, n) of +-1 whose first column is 1, float64; None where none of the constructions gives one.

    Sylvester's doubling of 1, of Paley's first (q + 1, q prime, 3 mod 4) or second kind (2 (q + 1), q prime, 1 mod 4).
    """
    if n in (1, 2):
        return TWO[:n, :n]
    if n % 4:
        return None
    if (half := hadamard(n // 2)) is not None:
        return torch.kron(TWO, half)
    if _is_prime(n - 1):
        border = torch.ones(n, n, dtype=torch.float64)
        border[1:, 0] = -1
        found = _conference(n - 1, border) + torch.eye(n, dtype=torch.float64)
    elif (n // 2) % 4 == 2 and _is_prime(n // 2 - 1):
        conference = _conference(n // 2 - 1, torch.ones(n // 2, n // 2, dtype=torch.float64))
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        found = torch.kron(conference, TWO) + torch.kron(torch.eye(n // 2, dtype=torch.float64), diagonal)
    else:
        return None
    return found * found[:, :1]


def _conference(q: int, border: torch.Tensor) -> torch.Tensor:
    """`border` (q + 1, q + 1) around Jacobsthal's matrix of the prime q: +1 where i - j is a square, 0 at i = j."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    border[1:, 1:] = character[(index[:, None] - index) % q]
    border[0, 0] = 0
    return border


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def rotation_matrix(n: int, kind: str, seed: int, fixing: bool) -> torch.Tensor:
    """A random orthogonal matrix R (n, n), float64; `fixing`: with R 1 = 1, as every one of kind "random" is.

    H D of a Hadamard matrix H and random signs D spreads one large channel evenly over all. With R 1 = 1 it is
    H D H^T, the first column of H being constant and its sign +.
    """
    source = torch.Generator().manual_seed(seed)
    matrix = hadamard(n) if kind == "hadamard" else None
    if matrix is None:
        ones = torch.ones(n, 1, dtype=torch.float64)
        one, two = (
            torch.linalg.qr(torch.cat([ones, torch.randn(n, n - 1, generator=source, dtype=torch.float64)], dim=1))[0]
            for _ in range(2)
        )
        return torch.mm(one, two.T)
    signs = 2.0 * torch.randint(2, (n,), generator=source) - 1
    if not fixing:
        return matrix * signs / math.sqrt(n)
    signs[0] = 1
    return (matrix * signs) @ matrix.T / n
