"""Load models and tokenizers from a directory, with errors that name the file."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..anatomy.classes import causal_class
from ..anatomy.encoders import parse_encoder
from ..anatomy.fit import POOLER, belonging
from ..anatomy.packed import loadable
from ..anatomy.parsed import parse_config
from ..anatomy.quiet import quiet
from ..anatomy.sites import Anatomy
from ..bounded import GIB, Unbounded, bounded
from ..checkpoint.config import CONFIG, read_config, without_choices
from ..checkpoint.layout import read_layout
from ..checkpoint.regular import read_json
from ..checkpoint.source import has_tokenizer
from ..endings.temporary import of_temporary
from ..errors import DamagedCheckpoint, NoSpace, SourceError, brief, out_of_memory
from .by_layers import ByLayers, loading_by
from .memory import HERE, Place
from .model import Live
from .port import TEXT, Port
from .templates import require_templates

GENERATION = "generation_config.json"
LOADING_SECONDS, LOADING_MEMORY = 30, 4 * GIB  # a vocabulary of 256,000 tokens takes some seconds and one GiB
# What a tokenizer is tried on: what this program has it read besides texts, and a bit of everything.
TRIED = (
    "\n",
    " ",
    ".",
    " the",
    "The quick brown fox jumps over the lazy dog.",
    "Hello,  World 2024!\n\tf(x) \u00fcn\u6f22",
)


def require_device(device: str) -> None:
    """SourceError unless `device` is "auto" or a torch device that this machine has."""
    if device == "auto":
        return
    here = ", ".join(_devices())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names of old devices are refused below
            kind = torch.device(device).type
    except RuntimeError as error:
        raise SourceError(f"--device {device} is no torch device; this machine has {here}, or give auto.") from error
    if kind == "meta":
        raise SourceError(f"--device {device} computes nothing; this machine has {here}, or give auto.")
    try:
        torch.empty(1, device=device)
    except Exception as error:  # a backend that is not built, not installed or not plugged in: each says so in its way
        raise SourceError(
            f"--device {device} cannot be used ({brief(error)}); this machine has {here}, or give auto."
        ) from error


def _devices() -> list[str]:
    """The torch devices of this machine."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if kind is None else ["cpu", *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))]


def from_files(
    kind: Any, directory: Path, config: PreTrainedConfig, dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, dict]:  # fmt: skip
    """The model of transformers' class `kind` in `directory`, and its report of the load; a checkpoint's Python files
    are never run. Whatever transformers raises."""
    found: tuple[PreTrainedModel, dict] = kind.from_pretrained(
        directory, config=config, dtype=dtype, device_map=None if device == "cpu" else device,
        local_files_only=True, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    return found


def load_original(
    directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", by_layers: ByLayers | None = None,
    encoder: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """The unchanged model, a causal language model or one with an `encoder`, through transformers' own code only (a
    checkpoint's Python files are never run).

    `device` is a torch device, or "auto" to let accelerate place it over GPUs, memory and disk. `by_layers`: weights
    come when they are called for. Raises DamagedCheckpoint where tensors and config do not fit, SourceError where
    transformers cannot load them.
    """
    try:
        with quiet(), loading_by(by_layers, directory) as finish:
            raw = without_choices(read_config(directory), directory / CONFIG)
            config, kind = parse_encoder(raw) if encoder else _causal(raw)
            model, report = from_files(kind, directory, config, dtype, device)
    except Exception as error:  # of any class: transformers trusts the types of what is in JSON files
        require_memory(directory, error)
        raise SourceError(
            f"{directory}: transformers cannot load it ({brief(error)}); give a complete checkpoint."
        ) from error
    require_fit(directory, model, report)
    with quiet():
        return finish(model.eval(), config, dtype)


def _causal(raw: dict) -> tuple[PreTrainedConfig, Any]:
    config = loadable(parse_config(raw))
    config._attn_implementation = None
    return config, causal_class(type(config))


def live_original(
    directory: Path, anatomy: Anatomy, place: Place = HERE, dtype: torch.dtype = torch.float32, port: Port = TEXT
) -> Live:  # fmt: skip
    """The same, wherever it is to compute: resident, or layer by layer where it does not fit. NoSpace if neither."""
    by_layers = place.by_layers(anatomy, read_layout(directory), dtype)
    model = load_original(directory, dtype, place.device, by_layers, encoder=anatomy.patching is not None)
    return Live(model, anatomy, port)


def require_in_memory(model: PreTrainedModel, what: str) -> None:
    """SourceError for a model that accelerate keeps elsewhere in part: what is offloaded has no gradients to give, and
    cannot be changed in place."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SourceError(
            f"{what} needs all of the model in memory, and part is elsewhere; give another --device or more --memory."
        )


def require_memory(directory: Path, error: Exception) -> None:
    """NoSpace or NoTemporary if `error`, raised while something was loaded, is of memory or of temporary files."""
    if (temporary := of_temporary(error)) is not None:
        raise temporary from error
    if out_of_memory(error):
        raise NoSpace(f"{directory} does not fit into memory; try --device auto, which also uses the disk.") from error


def require_fit(directory: Path, model: PreTrainedModel, report: dict) -> None:
    """DamagedCheckpoint unless transformers' `report` of a load says that each tensor of `model` found its place.

    Tensors that are not part of the model may lie beside them.
    """
    missing = [name for name in report.get("missing_keys", ()) if POOLER.search(name) is None]
    unexpected = belonging(model, report.get("unexpected_keys", ()))
    wrong = {**report, "missing_keys": missing, "unexpected_keys": unexpected}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(wrong.get(kind, ()), key=str):
            name, *shapes = found[0] if isinstance(found[0], tuple) else (found[0],)
            sizes = " should be ".join(str(tuple(shape)) for shape in shapes)
            raise DamagedCheckpoint(
                f"{directory}: its tensors do not fit its config.json ({len(found)} {kind.replace('_', ' ')}, "
                f"first {name}{f', {sizes}' if sizes else ''}); download or save the checkpoint again."
            )


def require_generation(directory: Path) -> None:
    """DamagedCheckpoint or SourceError for a generation_config.json with which transformers would load no model."""
    path = directory / GENERATION
    if not os.path.lexists(path):
        return
    settings = read_json(path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = settings.get(name)
        if not all(type(token) is int for token in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
            raise SourceError(f"{path}: {name} is neither a token id nor a list of them; mend or remove it.")
    try:
        with quiet():
            GenerationConfig.from_dict(settings)
    except Exception as error:
        raise SourceError(
            f"{path}: transformers does not accept it ({brief(error)}); mend or remove the file."
        ) from error


def load_tokenizer(directory: Path, name: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, called `name` in errors; SourceError if there is none that loads and reads text.

    Its files are a stranger's program: they are tried in a child with limits of time and memory before they are loaded
    here, and so are its chat templates.
    """
    name = str(directory) if name is None else name
    if not has_tokenizer(path.name for path in directory.iterdir()):
        raise SourceError(f"{name} has no tokenizer files; put the model's own there.")
    _know_type(directory)
    try:
        bounded(_try_tokenizer, directory, seconds=LOADING_SECONDS, memory=LOADING_MEMORY)
        tokenizer = _tokenizer(directory)
    except Exception as error:  # the tokenizers library raises plain Exception for files it cannot read
        require_memory(directory, error)
        why = (str(error) if isinstance(error, Unbounded) else brief(error))[:100]
        raise SourceError(f"{name} has no tokenizer that loads ({why}); put the model's own files there.") from error
    require_templates(directory, name, tokenizer)
    return tokenizer


def _know_type(directory: Path) -> None:
    """Have transformers import the model type that config.json names: a converted one makes files, which are to be this
    process's own and not those of a child that ends before it removes them."""
    with contextlib.suppress(DamagedCheckpoint, SourceError):
        kind = read_json(directory / CONFIG).get("model_type")
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            CONFIG_MAPPING[kind]


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    with quiet():
        found: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise TypeError(f"{type(found).__name__} is none")
    return found


def _try_tokenizer(directory: Path) -> None:
    tokenizer = _tokenizer(directory)
    for text in TRIED:
        for special in (False, True):
            tokenizer.decode(tokenizer(text, add_special_tokens=special)["input_ids"])
