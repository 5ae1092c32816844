"""What config.json says of the slots and norms of a converted checkpoint: its entries `eab` and `head_norm`.

The runtime, which checkpoints carry, reads the same entries as plain dicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

FORMAT = 1

_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_AsList = PlainSerializer(list)
Format = Annotated[int, Field(ge=FORMAT, le=FORMAT)]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]
Two = Annotated[tuple[Size, Size], _AsTuple, _AsList]
Three = Annotated[tuple[Size, Size, Size], _AsTuple, _AsList]
Counts = Annotated[tuple[Count, ...], _AsTuple, _AsList]


def _rising(units: tuple[int, ...]) -> tuple[int, ...]:
    if not units or any(a >= b for a, b in zip(units, units[1:], strict=False)):
        raise ValueError("not numbers that rise")
    return units


class Entry(BaseModel):
    """An entry of config.json."""

    model_config = ConfigDict(frozen=True, strict=True)

    def to_dict(self) -> dict:
        """As JSON holds it: what has a default is written only where it is another."""
        return self.model_dump(exclude_defaults=True)


class MixerEntry(Entry):
    """What `config.eab` says of a mixer: see `anatomy.mixers.Mixer`."""

    model_config = ConfigDict(extra="forbid")

    inputs: Annotated[dict[str, Size], Field(min_length=1)]
    outputs: Counts
    state: Annotated[tuple[Count, Count], _AsTuple, _AsList]


class IndexerEntry(Entry):
    """What `config.eab` says of an indexer: see `anatomy.mixers.Indexer`."""

    model_config = ConfigDict(extra="forbid")

    key: Size
    cache: str


class EabEntry(Entry):
    """`config.eab`: what a prefix was folded into, in the order of the file.

    Args:
        prefix_ids: the prefix that was folded; empty where slots were trained from nothing.
        n_slots: slots of each site; 0 only beside norms.
        trunk: the class of the innermost model that holds all sites and mixers.
        sites: name of each site in the trunk -> [kv_heads, key_dim, value_dim].
        mixers: name of each mixer in the trunk -> what it is given, gives and keeps.
        indexers: name of each indexer in the trunk -> the width of its keys, and how its cache comes.
        whole_mask: the model's code looks into the mask, and cannot do with None.
        max_length: how many positions the fold is exact on, if that is bounded.
        sees_all: every query sees every key and every slot: an encoder.
    """

    model_config = ConfigDict(extra="forbid")

    format: Format
    prefix_ids: Annotated[tuple[Count, ...], _AsTuple, _AsList]
    n_slots: Count
    slots_visible: Literal["as_prefix", "always"]
    trunk: str
    sites: Annotated[dict[str, Three], Field(min_length=1)]
    mixers: dict[str, MixerEntry] = {}
    indexers: dict[str, IndexerEntry] = {}
    whole_mask: bool = False
    max_length: int | None = None
    sees_all: bool = False


class HeadNormEntry(Entry):
    """`config.head_norm`: the norms, in the order of the file.

    Args:
        sites: name of each normed site in the trunk -> [heads, value_dim].
        per_head: whether each head has a weight of its own, or all of a site share one.
        gated: whether each head has a gate.
        eps: added to the mean square of a head.
    """

    format: Format
    sites: Annotated[dict[str, Two], Field(min_length=1)]
    per_head: bool
    gated: bool
    eps: Annotated[float, Field(gt=0, lt=1)]


class RegistersEntry(Entry):
    """`config.test_time_registers`: the token that takes what units would put on patches, in the order of the file.

    Args:
        at: where it stands among the tokens.
        blocks: names in the trunk of the blocks that it passes.
        units: name in the trunk of each down projection -> units of what enters it.
    """

    model_config = ConfigDict(extra="forbid")

    format: Format
    at: Annotated[int, Field(ge=0, le=1)]
    blocks: Annotated[tuple[str, ...], Field(min_length=1), _AsTuple, _AsList]
    units: Annotated[dict[str, Annotated[Counts, AfterValidator(_rising)]], Field(min_length=1)]


@dataclass(frozen=True)
class Entries:
    """All that config.json says of what was added."""

    eab: EabEntry
    head_norm: HeadNormEntry | None = None

    def to_dict(self) -> dict[str, dict]:
        norms = {} if self.head_norm is None else {"head_norm": self.head_norm.to_dict()}
        return {"eab": self.eab.to_dict(), **norms}
