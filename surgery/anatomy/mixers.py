"""Find what else in a model knows of the tokens before: mixers, which keep a state, and indexers of sparse attention.

Found by what they ask of the cache, not by their names: convolution states, recurrent states, keys of an indexer.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

# How transformers' caches are asked for states, the last of them being MiniMax's own; and for keys of an indexer.
ASKED = ("get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state", "get_linear_cache")
INDEXED = "update_indexer"


@dataclass(frozen=True)
class Mixer:
    """One mixer: `name` within the trunk. `inputs`: argument -> width, of those that are a sequence.

    `outputs`: which of its outputs are one. `state`: the layer and the state in it that it asks the cache for.
    """

    name: str
    inputs: dict[str, int]
    outputs: tuple[int, ...]
    state: tuple[int, int]

    @property
    def entry(self) -> dict:
        """What `config.eab` says of it."""
        return {"inputs": self.inputs, "outputs": list(self.outputs), "state": list(self.state)}


@dataclass(frozen=True)
class Indexer:
    """One indexer: `name` within the trunk, the width of its keys, and the argument that its cache comes by."""

    name: str
    key: int
    cache: str

    @property
    def entry(self) -> dict:
        """What `config.eab` says of it."""
        return {"key": self.key, "cache": self.cache}


@dataclass
class Asking:
    """A module that asked the cache for something, and what it got and gave.

    `asked`: layers and states; `indexed`: the width of its index keys, if it is an indexer.
    """

    module: nn.Module
    given: dict[str, Any]
    asked: set[tuple[int, int]] = field(default_factory=set)
    indexed: int | None = None
    output: Any = None
    times: int = 0


@contextlib.contextmanager
def asking(model: PreTrainedModel) -> Iterator[list[Asking]]:
    """Collects meanwhile the modules of `model` that ask a cache for more than keys and values, in order.

    The list is filled at the end of the block.
    """
    found: dict[nn.Module, Asking] = {}
    running: list[tuple[nn.Module, dict[str, Any]]] = []
    with contextlib.ExitStack() as undo:

        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = inspect.signature(module.forward).parameters
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            running.append((module, given))
            for value in given.values():
                if isinstance(value, Cache) and "asked_by" not in vars(value):
                    _interpose(value, running, found)

        def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running.pop()
            if module in found:
                found[module].output = output
                found[module].times += 1

        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(entering, with_kwargs=True, prepend=True).remove)
            undo.callback(module.register_forward_hook(leaving).remove)
        seen: list[Asking] = []
        yield seen
        seen += found.values()


def _interpose(cache: Any, running: list[tuple[nn.Module, dict[str, Any]]], found: dict[nn.Module, Asking]) -> None:
    """Note who asks `cache` for states."""
    cache.asked_by = found
    for name in (*ASKED, INDEXED):
        if (method := getattr(cache, name, None)) is None:
            continue
        signature = inspect.signature(method)

        def asked(
            *args: Any, name: str = name, method: Any = method, signature: inspect.Signature = signature, **kwargs: Any
        ) -> Any:  # fmt: skip
            bound = signature.bind(*args, **kwargs).arguments
            module, given = running[-1]
            asking = found.setdefault(module, Asking(module, given))
            asking.asked.add((bound["layer_idx"], bound.get("state_idx", 0)))
            if name == INDEXED:
                asking.indexed = bound["indexer_key_states"].shape[-1]
            return method(*args, **kwargs)

        setattr(cache, name, asked)


def described(asking: Asking, name: str, rows: int, tokens: int) -> Mixer | Indexer | str:
    """What asked, on `rows` of so many `tokens`; or, in words, why its prefix cannot be remembered."""
    if asking.times != 1:
        return f"{name} runs {asking.times} times in one forward pass, and its prefix would go in front of each"
    if len(asking.asked) != 1:
        return f"{name} keeps {len(asking.asked)} states in one call, which a remembered prefix does not know"
    if asking.indexed is not None:
        cache = next(argument for argument, value in asking.given.items() if isinstance(value, Cache))
        return Indexer(name, asking.indexed, cache)
    inputs, other = {}, []
    for argument, value in asking.given.items():
        if isinstance(value, torch.Tensor) and value.shape[:2] == (rows, tokens):
            if value.ndim == 3 and value.is_floating_point():
                inputs[argument] = value.shape[-1]
            elif "mask" not in argument and argument != "position_ids":
                other.append(argument)
    if not inputs or other:
        said = f"reads {other[0]}" if other else "reads no sequence of vectors"
        return f"{name} {said}, which cannot be remembered of a prefix"
    output = asking.output
    parts = [output] if isinstance(output, torch.Tensor) else list(output)
    outputs = tuple(
        place for place, part in enumerate(parts) if isinstance(part, torch.Tensor) and part.shape[:2] == (rows, tokens)
    )
    return Mixer(name, inputs, outputs, next(iter(asking.asked)))
