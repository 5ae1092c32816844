"""Quantised models as transformers loads them here: weights unpacked in memory, inputs rounded as the format says."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..bounded import GIB, Unbounded, bounded
from ..checkpoint.compressed import METHOD
from ..checkpoint.layout import Layout
from ..checkpoint.quantised import KEY, unpacking
from ..errors import SourceError, UnsupportedModel
from ..words import named

_ABSMAX = ".absmax"  # scales of bitsandbytes, beside each weight that it packs
_SECONDS = 3  # of processor time for all patterns of a config: thousands of names take a fraction of one


def loadable(config: PreTrainedConfig) -> PreTrainedConfig:
    """A transformers config with which `from_pretrained` unpacks quantised weights; `config` itself where it has none.

    transformers puts an object of its own in place of what stood there, so `config` is left alone.
    """
    settings = getattr(config, KEY, None)
    if not isinstance(settings, dict):
        return config
    config = copy.deepcopy(config)
    setattr(config, KEY, unpacking(settings))
    return config


def from_headers(layout: Layout, blank: PreTrainedModel, config: PreTrainedConfig) -> tuple[Layout, PreTrainedConfig]:
    """What transformers can load without values: tensors, and the config to load them by.

    The loader of bitsandbytes reads shapes from values. So its weights are taken as if they were not packed: one of as
    many elements as the model's has the model's shape.
    """
    settings = getattr(config, KEY, None)
    if not isinstance(settings, dict) or settings.get("quant_method") != "bitsandbytes":
        return layout, loadable(config)
    config = copy.deepcopy(config)
    delattr(config, KEY)
    wanted, tensors = blank.state_dict(), {}
    packed = {name.removesuffix(_ABSMAX) for name in layout.tensors if name.endswith(_ABSMAX)}
    for name, info in layout.tensors.items():
        if name in packed and name in wanted and 2 * math.prod(info.shape) == wanted[name].numel():
            shape = tuple(wanted[name].shape)
            block = wanted[name].numel() // max(1, math.prod(layout.tensors[name + _ABSMAX].shape))
            if shape[-1] % max(1, block):
                raise UnsupportedModel(
                    f"{layout.root}: {named(name)} has rows of {shape[-1]:,}, which blocks of {block:,} do not fill, "
                    "and bitsandbytes unpacks such wrongly on a CPU; give the checkpoint it was quantised from"
                )
            tensors[name] = replace(info, shape=shape)
        elif f"{name.partition('.weight.')[0]}.weight" not in packed:
            tensors[name] = info
    return replace(layout, tensors=tensors), config


def require_patterns(config: PreTrainedConfig, blank: PreTrainedModel) -> None:
    """SourceError where patterns for names of layers, which some formats have, do not end on the names of this model.

    A pattern of a few characters can take years. They are tried in a child, as transformers would.
    """
    settings = getattr(config, KEY, None)
    if not isinstance(settings, dict):
        return
    patterns = sorted({text.removeprefix("re:") for text in _texts(settings) if any(c in text for c in "*+{?")})
    names = [name for name, _ in blank.named_modules()]
    try:
        bad = bounded(_unreadable, patterns, names, seconds=_SECONDS, memory=GIB)
    except Unbounded as error:
        raise SourceError(
            f"config.json: the patterns in {KEY} are too much for {len(names):,} names ({error}); correct them."
        ) from error
    if bad is not None:
        raise SourceError(f"config.json: {KEY} has the pattern {named(bad)}, which is none; correct it.")


def require_plain_sites(model: PreTrainedModel, sites: Iterable[str]) -> None:
    """UnsupportedModel where the format rounds inside of attention: slots would stay as they are."""
    for site in sites:
        if hasattr(model.get_submodule(site), "quantization_scheme"):
            raise UnsupportedModel(
                f"config.json: by {KEY} attention itself is rounded in {named(site)}, which slots would not be; give "
                "the checkpoint it was quantised from"
            )


Unpack = Callable[[nn.Module], None]


def comes_apart(config: PreTrainedConfig) -> bool:
    """Whether the layers of a model can be unpacked one by one; so it is for weights that are not packed at all."""
    settings = getattr(config, KEY, None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return settings is None or str(getattr(method, "value", method)) == METHOD


def unpacking_each(model: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Unpack | None:
    """What unpacks a module of `model`, whose weights come when they are called for, as soon as they are there; None
    where nothing comes packed."""
    if getattr(config, KEY, None) is None or not hasattr(model, "hf_quantizer"):  # else transformers has unpacked it
        return None
    from compressed_tensors.compressors import decompress_module

    compressor = model.hf_quantizer.compressor
    compressor.remove_decompression_hook(model)

    def unpack(module: nn.Module) -> None:
        decompress_module(module, compressor.force_compression_format)
        _widen(module.parameters(recurse=False), dtype)

    return unpack


@dataclass(frozen=True)
class PackedForm:
    """What a module holds while its weights are packed, by name, and what is said of that: none of it has values."""

    parameters: dict[str, Any]
    buffers: dict[str, Any]
    status: Any

    @classmethod
    def of(cls, module: nn.Module) -> PackedForm:
        return cls({**module._parameters}, {**module._buffers}, getattr(module, "quantization_status", None))

    def give(self, module: Any) -> None:
        """Have `module` hold this, and nothing else."""
        for held, before in ((module._parameters, self.parameters), (module._buffers, self.buffers)):
            held.clear()
            held.update(before)
        if self.status is not None:
            module.quantization_status = self.status


def packed_forms(model: nn.Module) -> dict[str, PackedForm]:
    """Of each module of `model`, none of whose weights are there, that comes packed."""
    return {name: PackedForm.of(part) for name, part in model.named_modules() if hasattr(part, "quantization_scheme")}


def unpacked(model: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """`model`, loaded by `config` in `dtype`, with its quantised weights unpacked now and none in a coarser dtype.

    transformers leaves weights beside quantised ones in the dtype that they are stored in.
    """
    if getattr(config, KEY, None) is None:
        return model
    if hasattr(model, "ct_decompress_hook"):
        _decompress(model)
    elif hasattr(model, "hf_quantizer"):
        model = model.dequantize(dtype)
    _widen(model.parameters(), dtype)
    return model


def _widen(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.itemsize < dtype.itemsize and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)


def _decompress(model: Any) -> None:
    """What compressed-tensors does in the first call of the whole model: here a part of it may be called first.

    It would also wrap each module as if it were offloaded, which is left out where none is.
    """
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization import QuantizationStatus

    compressor = model.hf_quantizer.compressor
    if any(parameter.is_meta for parameter in model.parameters()):
        compressor.decompress_model(model)
        return
    for module in model.modules():
        decompress_module(module, compressor.force_compression_format)  # passes over those that are not compressed
    compressor.quantization_config.quantization_status = QuantizationStatus.DECOMPRESSED
    compressor.remove_decompression_hook(model)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _unreadable(patterns: list[str], names: list[str]) -> str | None:
    """The first of `patterns` that is none, after all others have been matched against all names."""
    bad = None
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error:
            bad = bad or pattern
            continue
        for name in names:
            compiled.match(name)
    return bad
