"""Recipes: their schema, part by part, and reading them from files."""

from .gates import Equivalence, MassiveActivations, Perplexity, Quantised, Verify
from .operations import AttentionBias, HeadNorm, Operation, Smoothing
from .pretrain import FromScratch, Pretrain
from .recipe import Recipe
from .tune import Dataset, Lora, Tune

__all__ = [
    "AttentionBias", "Dataset", "Equivalence", "FromScratch", "HeadNorm", "Lora", "MassiveActivations", "Operation",
    "Perplexity", "Pretrain", "Quantised", "Recipe", "Smoothing", "Tune", "Verify",
]  # fmt: skip
