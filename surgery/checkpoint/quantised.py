"""Whether a checkpoint is quantised, how, and whether slots can be computed from it: from config.json and headers.

The weights stay packed, byte for byte. transformers' own loaders unpack them in memory. What a stranger's
`quantization_config` may say to them is bounded here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..words import listing, named
from .config import CONFIG, entries
from .header import TensorInfo
from .layout import Layout

KEY = "quantization_config"
_ELSEWHERE = ("compression_config",)  # what older versions of compressed-tensors called it
_MLX = "quantization"
# Files in which older tools say what newer ones write into config.json.
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
# Endings of the tensors of packed weights, and who writes them.
_PACKED = {
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes": (
        ".absmax",
        ".nested_absmax",
        ".quant_map",
        ".nested_quant_map",
        ".SCB",
        ".weight_format",
        ".quant_state.bitsandbytes__nf4",
        ".quant_state.bitsandbytes__fp4",
    ),
    "compressed-tensors": (".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
    "fp8": (".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale", ".activation_scale"),
    "MXFP4": ("_proj_blocks", "_proj_scales"),
    "HQQ": (".W_q",),
    "quanto": (".weight._data", ".weight._scale"),
    "AQLM": (".codebooks",),
}
_WHOLE_NUMBERS = ("U8", "I8", "U16", "I16", "U32", "I32")
# How weights are to be loaded is no part of a checkpoint, and some of these choose kernels.
_LOADING = ("dequantize", "run_compressed", "use_optimized_inference", "backend", "use_kernels")
_MOST_TEXTS, _LONGEST_TEXT, _MOST = 2**13, 2**10, 2**20  # texts, characters of one, and the largest number


@dataclass(frozen=True)
class _Loader:
    """How transformers reads one format: packages that it needs beside those that surgery has, and settings with which
    it unpacks weights in memory on any device."""

    needs: tuple[str, ...] = ()
    unpacking: tuple[str, ...] = ()


_LOADERS = {
    "compressed-tensors": _Loader(needs=("compressed-tensors",)),
    "fp8": _Loader(unpacking=("dequantize",)),
    "mxfp4": _Loader(unpacking=("dequantize",)),
    "bitsandbytes": _Loader(needs=("bitsandbytes",)),
}
_SOURCE = "give the checkpoint it was quantised from"
# What to do with others, where there is a better way than to look for what they were made of.
_CONVERTED = "convert it to compressed-tensors (compressed_tensors.entrypoints.convert, AutoAWQConverter) and give that"
_WAYS_OUT = {"awq": f"{_CONVERTED}, or {_SOURCE}"}


@dataclass(frozen=True)
class Quantised:
    """How a checkpoint is quantised. `words` say the format, `needs` are the packages that its loader needs."""

    method: str
    words: str
    needs: tuple[str, ...]
    rounds_activations: bool  # as transformers runs it here
    as_plain: bool = False  # transformers reads it with `dequantize=True` alone

    def told(self, layout: Layout) -> dict[str, Any]:
        """As the plan's JSON holds it, with the bytes of packed weights and of what unpacks them."""
        packed = (info.nbytes for info in layout.tensors.values() if _packing(info, layout.tensors) is not None)
        return {"method": self.method, "format": self.words, "bytes": sum(packed)}

    def require_loader(self, where: Path) -> None:
        """SourceError where a package is missing that reads this format."""
        if missing := [name for name in self.needs if importlib.util.find_spec(name.replace("-", "_")) is None]:
            raise SourceError(
                f"{where} is quantised ({self.words}), and what reads it is not installed; "
                f"pip install {' '.join(missing)}."
            )


def quantised(root: Path, config: Mapping[str, Any], layout: Layout | None = None) -> Quantised | None:
    """How the checkpoint in `root` is quantised, None where it is not.

    SourceError where config.json, a file beside it or the tensors of `layout` say that weights are packed in a way that
    slots cannot be computed from.
    """
    where = root / CONFIG
    for key, value in entries(dict(config)):
        if key != KEY and _says_quantised(key.rpartition(".")[2], value):
            method = value.get("quant_method", "unknown") if isinstance(value, dict) else "unknown"
            raise _refused(f'{where} has a "{named(key)}" (method {named(method, 40)})')
    if config.get(KEY) is not None:
        found = _described(config[KEY], where)
        _require_whole_blocks(config[KEY], {} if layout is None else layout.tensors, root)
        return found
    if beside := next((name for name in QUANTISED_FILES if (root / name).exists()), None):
        raise _refused(f"{root / beside} says that the weights are quantised")
    tensors = {} if layout is None else layout.tensors
    for info in tensors.values():
        if (method := _packing(info, tensors)) is not None:
            raise _refused(
                f'{root / info.shard} holds "{named(info.name)}" ({info.dtype}), of quantised weights ({method}), and '
                f"{CONFIG} has no {KEY}"
            )
    return None


def unpacking(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A `quantization_config` with which transformers unpacks weights in memory, whatever the device."""
    asked = ("dequantize",) if _is_off_centre(settings) else _LOADERS[settings["quant_method"]].unpacking
    return {**settings, **dict.fromkeys(asked, True)}


def sealed(config: Mapping[str, Any]) -> str | None:
    """SHA-256, in hexadecimal, of what a config.json says of its quantisation; None where it says nothing."""
    if config.get(KEY) is None:
        return None
    return hashlib.sha256(json.dumps(config[KEY], sort_keys=True).encode()).hexdigest()


# ---- what config.json says


def _says_quantised(key: str, value: object) -> bool:
    return value is not None and key in (KEY, *_ELSEWHERE) or isinstance(value, dict) and key == _MLX


def _described(settings: object, where: Path) -> Quantised:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(method, str) or method not in _LOADERS:
        said = "unknown" if method is None else named(method, 40)
        raise _refused(f'{where} has a "{KEY}" (method {said})', _WAYS_OUT.get(str(method), _SOURCE))
    _require_bounded(settings, where)
    words, rounds = _WORDS[method](settings, where)
    return Quantised(method, words, _LOADERS[method].needs, rounds, _is_off_centre(settings))


def _require_bounded(settings: Mapping[str, Any], where: Path) -> None:
    """SourceError for what says how to load, and for numbers and texts beyond what any format has."""
    texts = 0
    for key, value in entries(dict(settings)):
        dotted = f"{KEY}.{key}"
        if key in _LOADING:
            raise SourceError(
                f"{where}: {named(dotted)} says how to load it, which is no part of a checkpoint; remove that key."
            )
        texts += isinstance(value, str)
        too_long = isinstance(value, str) and len(value) > _LONGEST_TEXT or texts > _MOST_TEXTS
        if too_long or isinstance(value, int | float) and not abs(value) <= _MOST:
            raise SourceError(f"{where}: {named(dotted)} holds more than any format needs; correct it.")


def _blocks(settings: Mapping[str, Any], where: Path) -> tuple[str, bool]:
    size = settings.get("weight_block_size")
    blocks = f", in blocks of {' x '.join(map(str, size))}" if isinstance(size, list) and len(size) == 2 else ""
    return f"{settings['quant_method']}{blocks}", False


def _require_whole_blocks(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], root: Path) -> None:
    """SourceError where blocks of fp8 weights do not fill them: transformers divides a weight into equal blocks, as
    many as it has scales, and would unpack other numbers than were packed."""
    size = settings.get("weight_block_size")
    if settings["quant_method"] != "fp8" or size is None:
        return
    if not isinstance(size, list) or [type(block) for block in size] != [int, int] or min(size) < 1:
        raise SourceError(f"{root / CONFIG}: {KEY}.weight_block_size is not two numbers of at least 1; correct it.")
    for name, scales in tensors.items():
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if weight is None or weight is scales or len(scales.shape) < 2:
            continue
        sides = zip(weight.shape[-2:], scales.shape[-2:], size, strict=False)
        if not all(count == 1 or length == count * block for length, count, block in sides):
            raise SourceError(
                f"{root / weight.shard}: {named(weight.name)} is {' x '.join(map(str, weight.shape))}, which blocks of "
                f"{' x '.join(map(str, size))} do not fill, and transformers cannot unpack it on a CPU; give the "
                "checkpoint it was quantised from."
            )


def _compressed(settings: Mapping[str, Any], where: Path) -> tuple[str, bool]:
    """What compressed-tensors' groups say, in words, and whether inputs of layers are rounded too."""
    for key, what in (("kv_cache_scheme", "the cache is rounded"), ("transform_config", "inputs are rotated")):
        if settings.get(key):
            raise _refused(f"{where}: by {KEY}.{key} {what}, which slots would not be")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise _refused(f"{where}: {KEY}.sparsity_config has format {named(sparsity.get('format'), 40)}")
    groups, found, rounds = settings.get("config_groups"), [], False
    for group in groups.values() if isinstance(groups, dict) else ():
        parts = {part: group.get(part) for part in _PARTS} if isinstance(group, dict) else {}
        for part, arguments in parts.items():
            if not isinstance(arguments, dict):
                continue
            strategy = arguments.get("strategy")
            if part != "weights":
                rounds = True
                if arguments.get("dynamic") is True and (strategy or "tensor") == "tensor":
                    raise _refused(
                        f"{where}: by {KEY} each batch has one scale for all of a layer's {_PARTS[part]}, so what a "
                        "prefix leaves depends on the text after it"
                    )
            scales = "" if part == "weights" else ", dynamic" if arguments.get("dynamic") else ", static"
            kind = {"float": "float", "int": "int"}.get(str(arguments.get("type", "int")), "")
            found.append(
                f"{_PARTS[part]} {kind}{named(arguments.get('num_bits', 8), 8)} per {named(strategy, 20)}{scales}"
            )
    words = listing(list(dict.fromkeys(found)), 6)
    form = named(settings.get("format"), 40)
    return f"compressed-tensors, {form}{f': {words}' if found else ''}", rounds


def _is_off_centre(settings: Mapping[str, Any]) -> bool:
    """Whether integers of compressed-tensors have zero points, and nothing but weights is rounded: transformers reads
    such a format only as plain weights. Of several groups it would then unpack all as it does the first."""
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if len(groups) != 1 or not isinstance(groups[0], dict):
        return False
    weights, *others = (groups[0].get(part) for part in _PARTS)
    return isinstance(weights, dict) and weights.get("symmetric") is False and not any(others)


def _four_bits(settings: Mapping[str, Any], where: Path) -> tuple[str, bool]:
    """What bitsandbytes says. In 8 bits it rounds otherwise with other text beside: outliers are of a whole batch."""
    if settings.get("load_in_4bit") is not True:
        raise _refused(f"{where}: bitsandbytes in 8 bits rounds a token by what others of its batch are")
    return f"bitsandbytes, {named(settings.get('bnb_4bit_quant_type', 'fp4'), 20)}", False


_WORDS = {"compressed-tensors": _compressed, "fp8": _blocks, "mxfp4": _blocks, "bitsandbytes": _four_bits}
_PARTS = {"weights": "weights", "input_activations": "inputs", "output_activations": "outputs"}


# ---- what tensors say


def _packing(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Who packs weights so that there is such a tensor; None where it is a plain one."""
    for method, endings in _PACKED.items():
        if info.name.endswith(endings):
            return method
    if info.dtype.startswith(("F4", "F6_", "F8_")):
        return "fp8 or smaller"
    if info.name.endswith(".scales") and f"{info.name.removesuffix('.scales')}.biases" in tensors:
        return "MLX"
    return "integers" if info.dtype in _WHOLE_NUMBERS and info.name.endswith("weight") and len(info.shape) > 1 else None


def _refused(what: str, way_out: str = _SOURCE) -> SourceError:
    return SourceError(f"{what}: slots cannot be folded exactly from these packed weights; {way_out}.")
