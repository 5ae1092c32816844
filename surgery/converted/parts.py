"""What may be added to attention sites, and the model types that say what was: one entry of a table for each part.

Imports nothing heavy: `import surgery` reads this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoint.manifest import TYPE_PREFIX


@dataclass(frozen=True)
class Part:
    """One kind of thing added to a site.

    Args:
        infix: what it adds to the model type, after `eab_`.
        title: what it adds to the names of classes, after `Eab`.
        file: the runtime's file, less `.py`, that holds the mixin.
        mixin: the class that goes in front of those of transformers; all of them derive from that of slots.
        summary: what the class has, for the generated file's docstring.
        tag, words, short: what the model card calls it: in its metadata, in its title, in running text.
    """

    infix: str
    title: str
    file: str
    mixin: str
    summary: str
    tag: str
    words: str
    short: str


SLOTS = "slots"
NORMS = "norms"
REGISTERS = "registers"
PARTS: dict[str, Part] = {
    SLOTS: Part(
        infix="",
        title="",
        file="eab_runtime",
        mixin="AttentionBiasMixin",
        summary="an explicit attention bias: slots in every attention site",
        tag="attention-bias",
        words="explicit attention bias",
        short="slots",
    ),
    NORMS: Part(
        infix="norm_",
        title="Norm",
        file="eab_head_norm",
        mixin="HeadNormMixin",
        summary="head norms in its attention sites",
        tag="head-norm",
        words="head-wise RMSNorm",
        short="norms",
    ),
    REGISTERS: Part(
        infix="registers_",
        title="Registers",
        file="eab_registers",
        mixin="RegistersMixin",
        summary="test-time registers",
        tag="test-time-registers",
        words="test-time registers",
        short="registers",
    ),
}


class Converted(NamedTuple):
    """What a converted model type says: the type that it was made from, and the parts that its sites have.

    Slots are always among them: the other parts stand on what installs slots, of which there may be none.
    """

    base: str
    parts: frozenset[str]


def added(parts: frozenset[str]) -> dict[str, Part]:
    """The entries of `parts` that tell a type from others, in the order of the table: slots where there is no other."""
    if unknown := parts - PARTS.keys():
        raise ValueError(f"{min(unknown)!r} is not a part; there are {', '.join(PARTS)}")
    return {name: PARTS[name] for name in PARTS if name in parts and name != SLOTS} or {SLOTS: PARTS[SLOTS]}


def converted_type(base: str, parts: frozenset[str]) -> str:
    """The model type of what was made from `base` by adding `parts`: `eab_llama`, `eab_norm_llama`.

    What knows slots alone must not load the latter, hence the name.
    """
    return TYPE_PREFIX + "".join(part.infix for part in added(parts).values()) + base


def class_prefix(parts: frozenset[str]) -> str:
    """What stands before a class's own name in that of the class derived from it: `Eab`, `EabNorm`."""
    return "Eab" + "".join(part.title for part in added(parts).values())


def converted_from(model_type: object) -> Converted | None:
    """The reverse of `converted_type`; None for what is no such type."""
    if not isinstance(model_type, str) or not model_type.startswith(TYPE_PREFIX):
        return None
    base, parts = model_type.removeprefix(TYPE_PREFIX), {SLOTS}
    for name, part in PARTS.items():
        if part.infix and base.startswith(part.infix):
            base = base.removeprefix(part.infix)
            parts.add(name)
    return Converted(base, frozenset(parts))
