"""Mixers that hand a state from token to token: they are told what they would have been given of the prefix.

A gated delta net, Mamba, a short convolution is a causal map too, so what reached it of the prefix is constant. Its
inputs are stored: n vectors, as they were where the mixer is called. Wherever it begins a text (its part of the cache
is empty, or there is none), they go in front of each row's first real token, and what it makes of them is dropped. With
a cache already filled nothing is done: the state has seen them.

`config.eab` describes them under `mixers`: the name of each in the trunk -> `inputs`, which maps the names of those
arguments that are a sequence to their width; `state`, the [layer, state] that it asks of the cache; and `outputs`,
which of its outputs are a sequence.

Notation: B batch, T tokens, n tokens of the prefix, d width.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .eab_added import Added, put_in_front

# Arguments that say where the texts of a packed row begin: each would need a prefix.
PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seqlens")


class RememberedInputs(Added):
    """The inputs of one mixer while the prefix ran: a parameter (n, d) for each argument that is a sequence."""

    def __init__(self, n: int, arguments: tuple[str, ...], entry: Mapping[str, Any]):
        super().__init__()
        self.arguments, self.outputs = arguments, tuple(entry["outputs"])
        self.layer, self.state = entry["state"]
        self.inputs = tuple(entry["inputs"])
        for name, width in entry["inputs"].items():
            self.add_parameter(name, n, width)

    def forward(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.inputs}


class Remembering:
    """In front of a mixer's class: where a text begins, the prefix goes before it."""

    remembered_inputs: RememberedInputs

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        entry = self.remembered_inputs
        given = {**dict(zip(entry.arguments, args, strict=False)), **kwargs}
        if _has_state(given, entry.layer, entry.state):
            return super().forward(**given)  # type: ignore[misc]
        if packed := [name for name in PACKING if given.get(name) is not None]:
            raise ValueError(f"packed sequences ({packed[0]}) are not supported with a remembered prefix")
        remembered = entry()
        first = next(iter(remembered))
        n, length = len(remembered[first]), given[first].shape[1]
        masks = [name for name, value in given.items() if "mask" in name and _covers(value, length)]
        padding = _padding(given[masks[0]]) if masks else None
        for name, inputs in remembered.items():
            given[name] = _inserted(given[name], inputs, padding)
        for name in masks:
            given[name] = _inserted(given[name], given[name].new_ones(n), padding)
        out = super().forward(**given)  # type: ignore[misc]
        if isinstance(out, Tensor):
            return _dropped(out, n, padding)
        return type(out)(
            _dropped(part, n, padding) if place in entry.outputs else part for place, part in enumerate(out)
        )


def _has_state(given: Mapping[str, Any], layer: int, state: int) -> bool:
    """Whether the cache among the arguments, if there is one, knows of tokens before these."""
    for value in given.values():
        if hasattr(value, "get_linear_cache"):  # MiniMax's own
            return value.get_linear_cache(layer) is not None
        if hasattr(value, "has_previous_state"):
            found: bool = value.has_previous_state(layer, state)
            return found
    return False


def _covers(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length


def _padding(mask: Tensor) -> Tensor:
    """How many tokens of padding stand left of each row's text: (B,). All of a row that has none yet."""
    return (mask.long().cumsum(dim=-1) == 0).sum(dim=-1)


def _inserted(sequence: Tensor, what: Tensor, padding: Tensor | None) -> Tensor:
    """sequence (B, T, ...) with `what` (n, ...) in front of each row's text: (B, n + T, ...)."""
    rows, length = sequence.shape[:2]
    both = torch.cat([what.to(sequence).expand(rows, *what.shape), sequence], dim=1)
    if padding is None:
        return both
    place, n, first = torch.arange(len(what) + length, device=sequence.device), len(what), padding[:, None]
    # Left of the text stands padding, which is behind `what` in `both`; then `what`, then the text, where it is.
    taken = torch.where(place < first, place + n, torch.where(place < first + n, place - first, place))
    return both[torch.arange(rows, device=sequence.device)[:, None], taken]


def _dropped(sequence: Tensor, n: int, padding: Tensor | None) -> Tensor:
    """sequence (B, n + T, ...) without what was inserted: (B, T, ...)."""
    if padding is None:
        return sequence[:, n:]
    place = torch.arange(sequence.shape[1] - n, device=sequence.device)
    kept = torch.where(place < padding[:, None], place, place + n)
    return sequence[torch.arange(len(sequence), device=sequence.device)[:, None], kept]


def refuse_late_texts(names: list[str], trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the trunk: ValueError where a text begins behind padding in a later piece than the first.

    A mixer's prefix belongs right in front of the text, and there the cache of the other rows is filled already.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    if torch.compiler.is_compiling() or cache is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    past = int(cache.get_seq_length())
    if 0 < past < mask.shape[1] and bool(((mask[:, :past] != 0).sum(dim=1) + mask[:, past] == 0).any()):
        raise ValueError(
            "a row's padding goes on in the second piece of a prefill, and its prefix would stand in the middle of it: "
            "make the first piece longer than the padding"
        )


def install_mixers(trunk: nn.Module, n: int, mixers: Mapping[str, Mapping[str, Any]]) -> contextlib.ExitStack:
    """Put empty inputs into every mixer; closing what is returned takes them out again."""
    undo = contextlib.ExitStack()
    if mixers:
        names = list(inspect.signature(trunk.forward).parameters)
        late = functools.partial(refuse_late_texts, names)
        undo.callback(trunk.register_forward_pre_hook(late, with_kwargs=True).remove)
    for name, entry in mixers.items():
        mixer: Any = trunk.get_submodule(name)
        mixer.remembered_inputs = RememberedInputs(n, tuple(inspect.signature(mixer.forward).parameters), entry)
        undo.callback(delattr, mixer, "remembered_inputs")
        put_in_front(mixer, Remembering, undo)
    return undo
