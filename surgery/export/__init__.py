"""The same model for other engines: each engine is one file, listed here."""

from .base import Engine, Finished
from .peft import Peft

ENGINES: tuple[type[Engine], ...] = (Peft,)

__all__ = ["ENGINES", "Engine", "Finished"]
