"""Load models and tokenizers from a directory, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..anatomy.fit import belonging
from ..anatomy.quiet import quiet
from ..anatomy.sites import parse_config
from ..checkpoint.config import CONFIG, read_config, without_choices
from ..checkpoint.source import has_tokenizer
from ..errors import DamagedCheckpoint, NoSpace, SourceError, brief, out_of_memory


def require_device(device: str) -> None:
    """SourceError unless `device` is "auto" or a torch device that this machine has."""
    if device == "auto":
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise SourceError(f"--device {device} is no torch device; give cpu, auto or cuda:0.") from error
    if kind == "meta":
        raise SourceError(f"--device {device} computes nothing; give cpu, auto or cuda:0.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SourceError(f"--device {device} cannot be used ({brief(error)}); give cpu or auto.") from error


def load_original(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """The unchanged model, through transformers' own code only (a checkpoint's Python files are never run).

    `device` is a torch device, or "auto" to let accelerate place it over GPUs, memory and disk. Raises
    DamagedCheckpoint where tensors and config do not fit, SourceError where transformers cannot load them.
    """
    try:
        with quiet():
            config = parse_config(without_choices(read_config(directory), directory / CONFIG))
            config._attn_implementation = None
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, device_map=None if device == "cpu" else device,
                local_files_only=True, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError) as error:
        require_memory(directory, error)
        raise SourceError(
            f"{directory}: transformers cannot load it ({brief(error)}); give a complete checkpoint."
        ) from error
    model, report = loaded
    require_fit(directory, model, report)
    return model.eval()


def require_in_memory(model: PreTrainedModel, what: str) -> None:
    """SourceError for a model that accelerate keeps elsewhere in part: what is offloaded has no gradients to give, and
    cannot be changed in place."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SourceError(f"{what} needs all of the model in memory, and part is offloaded; give another --device.")


def require_memory(directory: Path, error: Exception) -> None:
    """NoSpace if `error`, raised while a model was loaded, says that memory ran out."""
    if out_of_memory(error):
        raise NoSpace(f"{directory} does not fit into memory; try --device auto, which also uses the disk.") from error


def require_fit(directory: Path, model: PreTrainedModel, report: dict) -> None:
    """DamagedCheckpoint unless transformers' `report` of a load says that each tensor of `model` found its place.

    Tensors that are not part of the model may lie beside them.
    """
    wrong = {**report, "unexpected_keys": belonging(model, report.get("unexpected_keys", ()))}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(wrong.get(kind, ()), key=str):
            name, *shapes = found[0] if isinstance(found[0], tuple) else (found[0],)
            sizes = " should be ".join(str(tuple(shape)) for shape in shapes)
            raise DamagedCheckpoint(
                f"{directory}: its tensors do not fit its config.json ({len(found)} {kind.replace('_', ' ')}, "
                f"first {name}{f', {sizes}' if sizes else ''}); download or save the checkpoint again."
            )


def load_tokenizer(directory: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, or in its GGUF file; SourceError if there is none that loads."""
    way_out = "add its files, or leave text out and give the prefix as token ids (run --no-verify)"
    if gguf_file is None and not has_tokenizer(path.name for path in directory.iterdir()):
        raise SourceError(f"{directory} has no tokenizer files, and text needs them; {way_out}.")
    try:
        with quiet():
            named = {} if gguf_file is None else {"gguf_file": gguf_file}
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **named)
    except Exception as error:  # the tokenizers library raises plain Exception for files it cannot read
        raise SourceError(
            f"{directory} has no tokenizer that loads ({brief(error)}), and text needs one; {way_out}."
        ) from error
