"""The same model for other engines: each engine is one file, listed here."""

from .base import Engine, Finished
from .mlx import Mlx
from .peft import Peft
from .vllm import Vllm

ENGINES: tuple[type[Engine], ...] = (Peft, Mlx, Vllm)

__all__ = ["ENGINES", "Engine", "Finished"]
