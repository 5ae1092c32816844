"""Perplexity, and paired differences between two variants scored on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from .score import Score

CONFIDENCE = 0.95
NONE_IN = 3  # 0 of N differed: at 95%, up to 3/N may (the rule of three)


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95% confidence interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def paired(variant: Score, reference: Score) -> Interval:
    """NLL per token of `variant` minus `reference`, paired per chunk, with a Student-t interval over chunks."""
    if len(variant.chunks) != len(reference.chunks) or variant.targets != reference.targets:
        raise ValueError("paired differences need both variants scored on the same chunks")
    return mean_interval([(a - b) / variant.targets for a, b in zip(variant.chunks, reference.chunks, strict=True)])


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of `values` and its interval; a single value has an infinite one."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    margin = student_t(count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - margin, mean + margin)


def cosine_interval(cosines: Sequence[float]) -> Interval:
    """The same of cosines, whose ends are no further out than a cosine can be."""
    found = mean_interval(cosines)
    return Interval(found.mean, max(found.low, -1.0), max(found.mean, min(found.high, 1.0)))


def share_interval(same: Sequence[bool]) -> Interval:
    """The share of True among `same`, with Wilson's interval (1927): which is one where none or all are, too."""
    n, share, z = len(same), sum(same) / len(same), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(share, max(0.0, middle - margin), min(1.0, middle + margin))


def student_t(freedom: int) -> float:
    """The two-sided 95% quantile of Student's t.

    Exact for one and two degrees of freedom, else the Cornish-Fisher expansion in 1/freedom (Abramowitz & Stegun
    26.7.5), good to 1e-2 from three on and to 1e-4 from ten on.
    """
    upper = 0.5 + CONFIDENCE / 2
    if freedom == 1:
        return math.tan(math.pi * (upper - 0.5))
    if freedom == 2:
        return (2 * upper - 1) * math.sqrt(2 / (1 - (2 * upper - 1) ** 2))
    z = NormalDist().inv_cdf(upper)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
