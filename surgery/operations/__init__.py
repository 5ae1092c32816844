"""The operations, in the order in which a recipe may name them. Each is one file; a new one is a line here."""

from __future__ import annotations

from .attention_bias import AttentionBias
from .base import Operation
from .estimated_bias import EstimatedBias
from .head_norm import HeadNorm
from .quantise import Quantise
from .registers import Registers
from .rotation import Rotation
from .smoothing import Smoothing

# Each is fitted to what those before it leave.
OPERATIONS: tuple[type[Operation], ...] = (
    Registers, AttentionBias, EstimatedBias, Rotation, Smoothing, HeadNorm, Quantise,
)  # fmt: skip
