"""What an encoder of sound is called with, and how many tokens that becomes: found by calling it, on the meta device.

Families differ in the name of their input and in the sizes that their configs give, and in nothing that is asked here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ..errors import UnsupportedModel, brief
from .calls import Call
from .patching import Patching
from .sites import KNOWN_ARGUMENTS, Anatomy
from .tower import OFF_THE_SEAM, calls_of, pair

# Keys of configs. How many bins a spectrogram has, as families call it; how long it is, or half of it; strides of
# patches over bins and over time, where it is cut into such.
BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
LENGTH, POSITIONS = "max_length", "max_source_positions"
STRIDES = ("frequency_stride", "time_stride")
SAMPLES, FRAMES = 16_000, 1_000  # of a recording, where a tower takes any length: a second, and ten


def frames_of(kind: str, tower: PreTrainedModel) -> tuple[Patching, list[Call]]:
    """What becomes of a recording, and the attention calls: of the first shape that the tower takes, of those that its
    config speaks of."""
    refused: list[UnsupportedModel] = []
    for shape in _shapes(tower):
        try:
            calls = calls_of(tower, shape)
        except UnsupportedModel as error:
            refused.append(error)
            continue
        tokens = _tokens(kind, calls)
        patch, (down, right) = pair(tower.config, "patch_size"), (_count(tower, (key,)) for key in STRIDES)
        if patch is None or down is None or right is None:
            return Patching(tower.main_input_name, shape, None, None, 0, 0), calls
        cut = Patching(tower.main_input_name, shape, patch, (down, right), 0, 0)
        rows, columns = cut.grid(shape[1], shape[0])
        if (special := tokens - rows * columns) < 0:
            raise UnsupportedModel(f"{kind}: a recording is not {rows} x {columns} tokens, as its config has it")
        return replace(cut, special=special), calls
    raise next((error for error in refused if OFF_THE_SEAM in str(error)), refused[0])


def _shapes(tower: PreTrainedModel) -> Iterator[tuple[int, ...]]:
    """What a recording may look like to the tower, by the sizes in its config."""
    bins, length, positions = (_count(tower, keys) for keys in (BINS, (LENGTH,), (POSITIONS,)))
    if tower.main_input_name == "input_values":
        if bins is not None and length is not None:
            yield (length, bins)
        yield (SAMPLES,)
    elif bins is not None:
        for frames in (FRAMES, *(() if positions is None else (2 * positions,))):
            yield from ((bins, frames), (frames, bins))
    else:
        raise UnsupportedModel(f"{tower.config.model_type}: its config does not say how many bins its spectrogram has")


def _count(tower: PreTrainedModel, keys: tuple[str, ...]) -> int | None:
    """What the tower's config says under the first of `keys` that it has."""
    counts = (getattr(tower.config, key, None) for key in keys)
    return next((found for found in counts if type(found) is int and found > 0), None)


def _tokens(kind: str, calls: list[Call]) -> int:
    """How many tokens a recording is. UnsupportedModel unless it is as many in all layers, and slots could be there."""
    counts = sorted({call.query.shape[2] for call in calls})
    if len(counts) > 1:
        raise UnsupportedModel(
            f"{kind}: a recording is {counts[0]} tokens in one layer and {counts[-1]} in another, so what stands where "
            "is not known"
        )
    for call in calls:
        unknown = sorted(
            key for key, value in call.arguments.items() if value is not None and key not in KNOWN_ARGUMENTS
        )
        if unknown:
            raise UnsupportedModel(f"{kind}: it passes {unknown[0]} to its attention, which slots do not know")
    return counts[0]


def grid_of(anatomy: Anatomy, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many patches, rows and columns, what is given in this shape becomes; of sound, a row of frames.

    UnsupportedModel where the tower does not take it.
    """
    patching = anatomy.patching
    assert patching is not None
    if not patching.is_sound:
        return patching.grid(shape[-2], shape[-1])
    tower: Any = anatomy.blank.get_submodule(anatomy.trunk)
    try:
        tokens = _tokens(anatomy.model_type, calls_of(tower, shape))
    except UnsupportedModel as error:
        given, made = (" x ".join(map(str, one)) for one in (shape, patching.shape))
        raise UnsupportedModel(
            f"{anatomy.model_type}: it does not take recordings of {given} numbers, as its feature extractor makes "
            f"them ({brief(error.__cause__ or error)}); its config.json fits {made}"
        ) from error
    return (1, tokens) if patching.patch is None else patching.grid(shape[1], shape[0])


def norm_after(anatomy: Anatomy) -> str | None:
    """The norm in the trunk that is given what the last block returns, by name; None where there is none."""
    assert anatomy.patching is not None
    tower: Any = anatomy.blank.get_submodule(anatomy.trunk)
    returned: list[Any] = []
    found: list[str] = []

    def leaving(block: Any, args: Any, output: Any) -> None:
        returned.append(output[0] if isinstance(output, (tuple, list)) else output)

    with contextlib.ExitStack() as undo:
        undo.callback(tower.get_submodule(anatomy.blocks[-1]).register_forward_hook(leaving).remove)
        for name, module in tower.named_modules():
            if "norm" in type(module).__name__.lower():

                def entering(module: Any, args: Any, name: str = name) -> None:
                    if args and any(args[0] is one for one in returned):
                        found.append(name)

                undo.callback(module.register_forward_pre_hook(entering).remove)
        calls_of(tower, anatomy.patching.shape)
    return found[0] if len(found) == 1 else None
