"""Weights as the compressed-tensors library stores them: which schemes there are, and what stands in a weight's place.

The library defines the format and does the rounding; transformers and vLLM read it. What is said here is which scales
are given to it. It is an extra, and imported where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import SourceError

if TYPE_CHECKING:
    import torch

METHOD = "compressed-tensors"
INSTALL = "pip install 'checkpoint-surgery[quantised]'"


@dataclass(frozen=True)
class Format:
    """One scheme: the library's name of the format, bits and type of the weights, and how inputs are rounded.

    `inputs`: "static" (a scale per layer, stored), "token" (a scale per token, as they come) or None (not rounded).
    `most`: the largest magnitude that a stored number has.
    """

    format: str
    bits: int
    type: str
    inputs: str | None
    most: float
    grouped: bool = False

    @property
    def calibrated(self) -> bool:
        return self.inputs == "static"


FORMATS = {
    "w8a8_static": Format("int-quantized", 8, "int", "static", 127),
    "w8a8_dynamic": Format("int-quantized", 8, "int", "token", 127),
    "w4a16": Format("pack-quantized", 4, "int", None, 7, grouped=True),
    "fp8_dynamic": Format("float-quantized", 8, "float", "token", 448),
}


def require_library() -> None:
    """SourceError unless compressed-tensors is installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise SourceError(f"quantised checkpoints need the package compressed-tensors: {INSTALL}.") from error


def library_scheme(scheme: str, group: int, targets: Sequence[str] = ("Linear",), per_token: bool = False) -> Any:
    """The scheme as the library's own QuantizationScheme; `per_token`: with a scale for each token of its inputs."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    found = FORMATS[scheme]
    shared: dict[str, Any] = {"num_bits": found.bits, "type": found.type, "symmetric": True}
    split = {"strategy": "group", "group_size": group} if found.grouped else {"strategy": "channel"}
    inputs = None
    if found.inputs is not None:
        static = found.inputs == "static" and not per_token
        inputs = QuantizationArgs(**shared, strategy="tensor" if static else "token", dynamic=not static)
    return QuantizationScheme(
        targets=list(targets), weights=QuantizationArgs(**shared, **split), input_activations=inputs
    )


def config_entry(
    scheme: str, group: int, ignored: Iterable[str], per_token: Sequence[str] = ()
) -> dict[str, Any]:  # fmt: skip
    """`quantization_config` of config.json: this scheme for all linear layers but those named in `ignored`.

    `per_token`: ends of the names of layers whose inputs have a scale for each token.
    """
    from compressed_tensors.quantization import QuantizationConfig

    schemes = [library_scheme(scheme, group)]
    if per_token:  # in front: behind what means all layers, the library warns that it could match none
        targets = [rf"re:(.*\.)?{re.escape(name)}$" for name in per_token]
        schemes.insert(0, library_scheme(scheme, group, targets, per_token=True))
    entry = QuantizationConfig(
        config_groups={f"group_{at}": one for at, one in enumerate(schemes)}, format=FORMATS[scheme].format,
        quantization_status="compressed", ignore=list(ignored),
    )  # fmt: skip
    dumped: dict[str, Any] = entry.model_dump(mode="json")
    return dumped


def packed(
    weight: torch.Tensor, peak: torch.Tensor | None, scheme: str, group: int, per_token: bool = False
) -> Mapping[str, torch.Tensor]:  # fmt: skip
    """What is stored in place of `weight` (out, in): part of the name -> tensor; shapes alone, of a meta tensor.

    Scales are float32: max |w| / most of each output channel, or of each `group` input channels of it. `peak`: the
    largest |input|, a scalar, for static scales; none is stored of a layer `per_token`. What is zero throughout has the
    scale 1.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor

    found, wide = FORMATS[scheme], weight.detach().to(torch.float32)
    rows = wide.unflatten(1, (-1, group)) if found.grouped else wide
    state = {"weight": wide, "weight_scale": _scale(rows.abs().amax(dim=-1, keepdim=not found.grouped), found.most)}
    if found.calibrated and not per_token:
        largest = torch.zeros((), device=wide.device) if peak is None else peak.to(wide)
        state["input_scale"] = _scale(largest.reshape(1), found.most)
    compressor = BaseCompressor.get_value_from_registry(found.format)
    stored: Mapping[str, torch.Tensor] = compressor.compress(state, library_scheme(scheme, group, per_token=per_token))
    return stored


def _scale(largest: torch.Tensor, most: float) -> torch.Tensor:
    import torch

    return torch.where(largest > 0, largest / most, torch.ones_like(largest))
