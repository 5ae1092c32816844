"""transformers, and what it loads quantised models with, without their own advice."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

from tqdm.std import tqdm
from transformers.utils import logging as transformers_logging

# compressed-tensors asks nobody whether it may show bars, and logs by Python's loggers and by another.
_OTHER = "compressed_tensors"
_LOGGERS = (_OTHER, "bitsandbytes")


class quiet:
    """Keep transformers' own progress bars and advice off the screen while we show ours."""

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.levels = {name: logging.getLogger(name).level for name in _LOGGERS}
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.make_bar: Any = tqdm.__init__
        self.logger = _other_logger()
        if self.logger is not None:
            tqdm.__init__ = _without_bar(self.make_bar)  # type: ignore[method-assign]
            self.logger.disable(_OTHER)

    def __exit__(self, *exc) -> None:
        if self.logger is not None:
            tqdm.__init__ = self.make_bar  # type: ignore[method-assign]
            self.logger.enable(_OTHER)
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()


def _without_bar(make: Any) -> Any:
    """What makes a bar, whatever is asked of it, one that is not shown."""

    @functools.wraps(make)
    def silent(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **{**named, "disable": True})

    return silent


def _other_logger() -> Any:
    """What compressed-tensors logs by; None where it is not installed."""
    if importlib.util.find_spec(_OTHER) is None:
        return None
    from loguru import logger

    return logger
