"""Test-time registers (Jiang et al. 2025, arXiv 2506.08010): what a few MLP units put on patches moves to a token.

Encoders that were trained without registers put what concerns the image on patches of little information, whose norms
stand out from then on. The units that do so are found on calibration images. Their activation is moved to a token that
is added for it, or, where `attention_bias: {from: registers}` follows, to a token whose keys and values become slots:
then no token is added, and the units are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from transformers import PreTrainedTokenizerBase

from ..anatomy.stored import stored_name
from ..converted.card import Section
from ..converted.described import Described
from ..converted.entries import FORMAT
from ..errors import UnsupportedModel, brief
from ..live.as_it_came import reversibly
from ..live.model import Live
from ..live.places import down_projections, name_in
from ..live.port import Images, answer
from ..live.stream import stream
from ..recipe.fields import AutoOr
from ..runtime.eab_registers import install_registers
from ..survey.patches import Standing
from ..survey.register_neurons import SELECTIVE, RegisterNeuron, RegisterNeurons
from ..table import Table
from ..words import IMAGE, Called, called, count_of, fixed, listing, number, percent
from .base import Alter, Changes, Exact, Fitting, NothingToDo, Operation, Port, Stand, Target
from .units import left_out_by, mlp_parameters, projections_of, zeros_at

SHOWN = 8  # neurons in a table


@dataclass(frozen=True)
class Found:
    """The neurons, and `config.test_time_registers`; on how many images, and the mean number of patches that stood out
    in one. `sources`: where units are to be left out, by parameter of the trunk: its dimension, and which of it."""

    neurons: tuple[RegisterNeuron, ...]
    entry: Mapping[str, Any]
    images: int
    patches: float
    sources: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    called: Called = IMAGE


class Registers(Operation):
    """Move what register neurons put on patches of an encoder to a token that is added for it, at run time.

    `neurons`: "auto" takes those that dominate their MLP at patches that stand out (`survey.register_neurons`), or so
    many.
    """

    name: ClassVar[str] = "registers"
    adds: ClassVar[bool] = True
    reading: ClassVar[Port | None] = "images"

    neurons: Annotated[
        AutoOr, Field(description="how many units; auto takes those that dominate at patches that stand out")
    ] = "auto"
    _become_slots: bool = PrivateAttr(False)  # `attention_bias` makes slots of the token

    _entry: Mapping[str, Any] | None = PrivateAttr(None)  # what a converted checkpoint says was found

    def as_found(self, described: Described) -> Registers:
        copied = self.model_copy()
        copied._entry = None if described.registers is None else described.registers.to_dict()
        return copied

    def becoming_slots(self) -> Registers:
        """The same in front of `attention_bias`, which makes slots of the token: none is left at run time."""
        copied = self.model_copy()
        copied._become_slots = True
        return copied

    @property
    def exact(self) -> Exact:
        return "no"

    @property
    def changes_weights(self) -> bool:
        return self._become_slots

    @property
    def whole(self) -> bool:
        return False

    @property
    def reads(self) -> str | None:
        return "registers looks for its neurons"

    def plan(self, target: Target, parts: Found | None = None) -> Changes:
        anatomy = target.anatomy
        if anatomy.patching is None:
            raise UnsupportedModel(f"{anatomy.model_type}: is no encoder; leave 'registers' out")
        if anatomy.patching.is_text:
            raise UnsupportedModel(f"{anatomy.model_type}: reads text, in which no place is a register's; leave it out")
        if anatomy.patching.registers:
            raise UnsupportedModel(
                f"{anatomy.model_type}: has {anatomy.patching.registers} registers already; leave 'registers' out"
            )
        entry, how = self._entry if parts is None else parts.entry, "may change" if parts is None else "changed"
        names = projections_of(anatomy)
        if self._become_slots:
            changes = mlp_parameters(anatomy, names) if parts is None else parts.sources
            changed = {stored_name(target.layout, anatomy, f"{anatomy.lead}{name}"): how for name in changes}
            return Changes(changed=changed, words=("register neurons left out of the MLPs",))
        return Changes(
            config={} if entry is None else {"test_time_registers": {**entry}}, parts=frozenset({"registers"}),
            words=("a test-time register",),
        )  # fmt: skip

    def fit(self, live: Live, text: Fitting) -> Found:
        assert isinstance(live.port, Images)
        text.reporter.step("look for register neurons")
        special, most, read = live.port.special, None if self.neurons == "auto" else self.neurons, live.port.called
        with text.reporter.bar("neurons", None) as advance:
            standing = Standing()
            stream(live, text.chunks, [standing], advance=advance, what="which patches stand out")
            outliers = [[token for token in tokens if token >= special] for tokens in standing.chosen()]
            if not any(outliers):
                raise NothingToDo(
                    f"no {read.part} of a calibration {read.one} stands out against the others; leave registers out"
                )
            looking = RegisterNeurons(live, outliers)
            stream(live, text.chunks, [looking], advance=advance, what="neurons")
        if not (neurons := looking.found(most)):
            raise NothingToDo(
                f"{read.parts} stand out, but no unit of an MLP dominates what makes them so; say how many to take "
                "(neurons: 10), or leave registers out"
            )
        patches = sum(map(len, outliers)) / len(outliers)
        text.reporter.note(
            f"{count_of(len(neurons), 'register neuron')}; {patches:.1f} {read.parts} of {_a(read.one)} stand out"
        )
        if most is not None and len(neurons) < most:
            text.reporter.note(
                f"no more units are {SELECTIVE:g} times as active there as elsewhere, and {most} were asked"
            )
        entry = entry_of(live, neurons)
        _require_room(live, entry)
        sources = left_out_by(live, entry["units"]) if self._become_slots else {}
        return Found(tuple(neurons), entry, len(text.chunks), patches, sources, read)

    def graft(self, live: Live, parts: Found) -> contextlib.AbstractContextManager[object]:
        """Where the token becomes slots, `attention_bias` brings it in for as long as it takes means, and then leaves
        the units out."""
        if self._become_slots:
            return contextlib.nullcontext()
        return reversibly(live, lambda: install_registers(live.trunk, {**parts.entry}))

    def tensors(self, live: Live, parts: Found) -> Mapping[str, torch.Tensor]:
        return {}

    def alters(self, parts: Found, target: Target) -> Mapping[str, Alter]:
        """What makes the units that are left out: zeros."""
        return {f"{target.anatomy.lead}{name}": zeros_at(units, dim) for name, (dim, units) in parts.sources.items()}

    def could_make(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whole rows or columns of zeros, and not most of them."""
        changed = after != before
        for dim in range(before.ndim):
            places = changed.movedim(dim, 0).flatten(1).any(dim=1) if before.ndim > 1 else changed
            zeros = not bool(after.index_select(dim, places.nonzero().flatten()).any())
            if zeros and int(places.sum()) <= len(places) // 2:
                return True
        return False

    def found(self, parts: Found, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        neurons = [neuron.to_dict() for neuron in parts.neurons]
        counts = {parts.called.many: parts.images, parts.called.parts: parts.patches}
        return {"register_neurons": {"neurons": neurons, **counts}}

    @classmethod
    def table(cls, verdict: Mapping[str, Any]) -> Table | None:
        if not (found := verdict.get("register_neurons")):
            return None
        read = called(found)
        rows = [
            (str(one["layer"]), str(one["unit"]), number(one["activation"]), number(one["elsewhere"]),
             percent(one["reach"]))
            for one in found["neurons"][:SHOWN]
        ]  # fmt: skip
        more = len(found["neurons"]) - len(rows)
        return Table(
            "Register neurons", ("layer", "unit", "activation", "elsewhere", "of what its MLP writes"), rows,
            note=f"And {more} more." if more > 0 else "",
            text=f"Units that make {read.parts} stand out ({fixed(found[read.parts], 1)} in {_a(read.one)}): mean "
            f"activation there, and at other {read.parts}.",
        )  # fmt: skip

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (found := verdict.get("register_neurons")):
            return None
        read = called(found)
        return (
            f"Register neurons: {len(found['neurons'])}, which made {fixed(found[read.parts], 1)} {read.parts} of "
            f"{_a(read.one)} stand out."
        )

    def says(self, parts: Found, target: Target, recipe: Stand) -> Section:
        units = count_of(len(parts.neurons), "unit")
        if self._become_slots:
            return Section(
                text=f"{units} of its MLPs, which put high norms on {parts.called.parts} of little information, are "
                f"left out: {listing(sorted(parts.sources), 6)} have zeros there. A token that took their activation "
                "was what the slots were taken from.",
            )
        return Section(
            tag="test-time-registers",
            title="test-time registers",
            adds="registers",
            text=f"a **test-time register**: a token of zeros enters the first block and leaves after the last, and "
            f"what {units} of the MLPs would put on any token is moved to it, the largest of them. All weights are the "
            "source's, byte for byte; where none of those units is active, so is what the model computes but for one "
            "more token to attend to.",
        )


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _require_room(live: Live, entry: Mapping[str, Any]) -> None:
    """UnsupportedModel where blocks are handed something that is as long as the tokens are, and cannot take one
    more."""
    try:
        with install_registers(live.trunk, {**entry}):
            answer(live)
    except Exception as error:  # of any class: its code counts its tokens
        raise UnsupportedModel(
            f"{live.anatomy.model_type}: its blocks do not take one token more ({brief(error)}), such as a register; "
            "leave registers out"
        ) from error


def entry_of(live: Live, neurons: list[RegisterNeuron]) -> dict[str, Any]:
    """`config.test_time_registers`."""
    assert live.anatomy.patching is not None
    blocks, projections = live.anatomy.blocks, down_projections(live)
    units: dict[str, list[int]] = {}
    for neuron in sorted(neurons, key=lambda one: (one.block, one.unit)):
        units.setdefault(name_in(live, projections[neuron.block]), []).append(neuron.unit)
    at = live.anatomy.patching.cls
    return {"format": FORMAT, "at": at, "blocks": [*blocks], "units": units}
