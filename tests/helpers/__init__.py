"""What several test files share: tiny models and checkpoints, the matrix of families, where the repository is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
