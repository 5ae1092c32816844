"""Load models and tokenizers from a directory, with errors that name the file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .errors import DamagedCheckpoint, SourceError


def load_original(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """The unchanged model, through transformers' own code only (a checkpoint's Python files are never run).

    `device` is a torch device, or "auto" to let accelerate place it over GPUs, memory and disk.
    """
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, device_map=None if device == "cpu" else device, local_files_only=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(str(key) for key in report.get(kind, ())):
            raise DamagedCheckpoint(
                f"{directory}: its tensors do not fit its config.json ({len(found)} {kind.replace('_', ' ')}, first {found[0]})"
            )
    return model.eval()


def load_tokenizer(directory: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, or in its GGUF file; SourceError if there is none that loads."""
    try:
        with quiet():
            named = {} if gguf_file is None else {"gguf_file": gguf_file}
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **named)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"{directory}: has no tokenizer that loads ({reason}), and text needs one; add its files, or use token ids with --no-verify"
        ) from error


class quiet:
    """Keep transformers' own progress bars and advice off the screen while we show ours."""

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exc) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()
