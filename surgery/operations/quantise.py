"""Write linear layers in few bits, as a compressed-tensors checkpoint that transformers and vLLM run.

Weights are rounded to nearest with a scale for each output channel, or for each group of input channels. Static scales
of inputs are the largest |x| on calibration text, through the model with all other operations in place. Embeddings, the
output layer, norms and slots stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from ..anatomy.linears import linears, means, require_known
from ..anatomy.sites import Anatomy
from ..anatomy.stored import find_stored, splits, stored_name
from ..checkpoint.compressed import FORMATS, METHOD, Format, config_entry, packed, require_library
from ..checkpoint.layout import Stored
from ..checkpoint.quantised import KEY
from ..checkpoint.values import dtype_code
from ..converted.card import Section
from ..converted.derived import other_heads
from ..errors import UnsupportedModel
from ..live.model import Live
from ..live.quantised import activation_ranges, loaded_linears
from ..recipe.fields import AsTuple
from ..words import listing
from .base import Changes, Exact, Fitting, Operation, Stand, Target

CALLED = {
    "w8a8_static": "int8 weights and inputs, a stored scale for the inputs of each layer",
    "w8a8_dynamic": "int8 weights and inputs, a scale for each token as it comes",
    "w4a16": "4 bit weights, rounded to nearest, and inputs as they are",
    "fp8_dynamic": "float8 (e4m3) weights and inputs, a scale for each token as it comes",
}


GROUP = 128  # what engines have kernels for


@dataclass(frozen=True)
class Rounded:
    """What is rounded: name in the trunk -> the largest |input| on calibration text, None where no scale is stored."""

    peaks: Mapping[str, torch.Tensor | None]


class Quantise(Operation):
    """Write the linear layers in few bits, as a compressed-tensors checkpoint that transformers and vLLM run."""

    name: ClassVar[str] = "quantise"
    example: ClassVar[str] = "{scheme: w8a8_static}"
    last: ClassVar[bool] = True

    scheme: Annotated[
        Literal["w8a8_static", "w8a8_dynamic", "w4a16", "fp8_dynamic"],
        Field(description="bits of weights (w) and of their inputs (a), and whether the scales of inputs are stored"),
    ] = "w8a8_static"
    group: Annotated[int, Field(ge=16, multiple_of=16)] | None = Field(
        None, examples=[128], description="of w4a16: input channels of a weight that share a scale, 128 unless said"
    )

    per_token: Annotated[
        tuple[str, ...],
        AsTuple,
        Field(description="of w8a8_static: layers, such as down_proj, whose inputs have a scale per token instead"),
    ] = ()

    @field_validator("scheme", mode="before")
    @classmethod
    def _that_engines_run(cls, value: object) -> object:
        if value == "fp8_static":
            raise ValueError(
                "is fp8_static, which nothing has run here: vLLM 0.32 stops on it on CPUs; write fp8_dynamic"
            )
        return value

    @field_validator("group")
    @classmethod
    def _of_groups(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not FORMATS[info.data.get("scheme", "w8a8_static")].grouped:
            raise ValueError("is of w4a16, whose weights have scales for groups; leave it out")
        return value

    @field_validator("per_token")
    @classmethod
    def _of_stored_scales(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and not FORMATS[info.data.get("scheme", "w8a8_static")].calibrated:
            raise ValueError(f"is for a scheme with stored scales, and {info.data['scheme']} has none; leave it out")
        return value

    def _is_per_token(self, name: str) -> bool:
        return any(means(target, name) for target in self.per_token)

    @property
    def _channels(self) -> int:
        return GROUP if self.group is None else self.group

    @property
    def _format(self) -> Format:
        return FORMATS[self.scheme]

    @property
    def exact(self) -> Exact:
        return "no"

    @property
    def changes_weights(self) -> bool:
        return True

    @property
    def whole(self) -> bool:
        return False  # a weight at a time, when it is written

    @property
    def reads(self) -> str | None:
        return "quantise sets static scales" if self._format.calibrated else None

    def plan(self, target: Target, parts: Rounded | None = None) -> Changes:
        """UnsupportedModel where layers are not stored as the model has them, or are none that the format knows."""
        require_library()
        anatomy = target.anatomy
        layers = linears(anatomy.blank, anatomy)
        if splits(anatomy):
            raise UnsupportedModel(
                f"{anatomy.model_type}: some of its checkpoints hold tensors that transformers splits when it loads "
                "them, and of such a type it loads none in compressed-tensors' formats; leave quantise out"
            )
        require_known(self.per_token, list(layers), "quantise.per_token")
        replaced: dict[str, dict[str, Stored]] = {}
        for name, module in layers.items():
            if not isinstance(module, nn.Linear):
                raise UnsupportedModel(
                    f"{anatomy.model_type}: {name} is a {type(module).__name__}, and compressed-tensors knows Linear "
                    "alone; leave quantise out."
                )
            if self._format.grouped and module.in_features % self._channels:
                another = "group" if module.in_features % 16 == 0 else "scheme"
                raise UnsupportedModel(
                    f"{anatomy.model_type}: {name} has {module.in_features} inputs, which groups of {self._channels} "
                    f"do not divide; give quantise another {another}."
                )
            stored = stored_name(target.layout, anatomy, f"{anatomy.lead}{name}.weight")
            blank = self._packed(name, torch.empty(module.weight.shape, device="meta"), None)
            base = stored.removesuffix("weight")
            replaced[stored] = {f"{base}{part}": _as_stored(tensor) for part, tensor in blank.items()}
        entry = config_entry(self.scheme, self._channels, _ignored(anatomy, layers), self.per_token)
        return Changes(
            replaced=replaced, config={KEY: entry}, told={self.name: {"scheme": self.scheme, "layers": len(replaced)}}
        )

    def _packed(self, name: str, weight: torch.Tensor, peak: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """What is stored in place of the weight of the layer `name` in the trunk."""
        return packed(weight, peak, self.scheme, self._channels, self._is_per_token(name))

    def require(self, live: Live) -> None:
        loaded_linears(live)

    def fit(self, live: Live, text: Fitting) -> Rounded:
        names = loaded_linears(live)
        if not self._format.calibrated:
            return Rounded(dict.fromkeys(names))
        text.reporter.step("set the scales of inputs")
        with text.reporter.bar("quantise", len(text.chunks)) as advance:
            ranges = activation_ranges(live, text.chunks, advance)
        mixers = tuple(f"{mixer.name}." for mixer in live.anatomy.mixers)
        if unseen := [name for name in names if name not in ranges and name.startswith(mixers)]:
            raise UnsupportedModel(
                f"{live.anatomy.model_type}: the weight of {unseen[0]} is read without a call, so that its inputs, and "
                "with them their scale, are not known; take a scheme without static scales, or leave quantise out."
            )
        stored = [name for name in ranges if not self._is_per_token(name)]
        return Rounded({name: ranges[name].cpu() if name in stored else None for name in names})

    def graft(self, live: Live, parts: Rounded) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()  # the last one: rounded is what is written

    def tensors(self, live: Live, parts: Rounded) -> Mapping[str, torch.Tensor]:
        return {}

    def rewrite(
        self, parts: Rounded | None, target: Target, stored: str, weight: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Without `parts` the scale of inputs means nothing, and the rest is the same."""
        base = stored.removesuffix("weight")
        name = base.removesuffix(".").removeprefix(target.anatomy.lead)
        known = linears(target.anatomy.blank, target.anatomy) if parts is None else parts.peaks
        if name not in known:  # the checkpoint calls it by another name
            layout, anatomy = target.layout, target.anatomy
            name = next(one for one in known if find_stored(layout, anatomy, f"{one}.weight") == stored)
        written = self._packed(name, weight, None if parts is None else parts.peaks[name])
        return {f"{base}{part}": tensor for part, tensor in written.items()}

    def found(self, parts: Rounded, tokenizer: Any) -> dict[str, Any]:
        return {self.name: {"scheme": self.scheme, "layers": len(parts.peaks)}}

    def says(self, parts: Rounded, target: Target, recipe: Stand) -> Section:
        grouped = f", a scale for {self._channels} input channels" if self._format.grouped else ""
        apart = f"; inputs of {listing(self.per_token)} have a scale for each token" if self.per_token else ""
        return Section(
            text=f"The {len(parts.peaks):,} linear layers of the blocks are stored quantised: {CALLED[self.scheme]}"
            f"{grouped}{apart} (compressed-tensors, {self._format.format}). Loading them takes "
            "`pip install compressed-tensors`.",
            needs=(METHOD,),
        )


def _ignored(anatomy: Anatomy, layers: Mapping[str, nn.Module]) -> list[str]:
    """Names of the linear layers that stay as they are: those outside of the blocks, and of all other heads."""
    inside = {f"{anatomy.lead}{name}" for name in layers}
    named = anatomy.blank.named_modules()
    outside = [name for name, module in named if isinstance(module, nn.Linear) and name not in inside]
    return list(dict.fromkeys([*outside, *other_heads(anatomy.config)]))


def _as_stored(tensor: torch.Tensor) -> Stored:
    return Stored(dtype_code(tensor.dtype), tuple(tensor.shape))
