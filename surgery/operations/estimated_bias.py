"""Slots of an encoder (EAB): the mean key and value, over calibration images or recordings, of tokens that act as
biases.

Without causality no token is constant: a register sees the image. So these slots are estimates, and fidelity says what
they are worth. Registers that were trained (Darcet et al. 2024, arXiv 2309.16588) hardly carry anything of the image
but that, and once their keys and values are slots they need not be computed. Sun et al. 2024 (arXiv 2402.17762, section
5) find massive activations on the same tokens.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from transformers import PreTrainedTokenizerBase

from ..anatomy.calls import Call
from ..anatomy.encoders import Emptied, without_registers
from ..anatomy.patching import Patching
from ..anatomy.sites import Anatomy
from ..anatomy.stored import stored_name
from ..checkpoint.layout import Stored
from ..converted.card import Section
from ..errors import UnsupportedModel
from ..live.as_it_came import left_out, reversibly
from ..live.graft import Fold, eab_config, grafted, held_parts
from ..live.model import Live
from ..live.port import Batch
from ..live.stream import Observer, stream
from ..parts import every_shape
from ..runtime.eab_registers import install_registers, install_silence
from ..survey.patches import Standing
from ..words import IMAGE, Called, called, count_of
from .base import Changes, Exact, Fitting, NothingToDo, Operation, Port, Stand, Target, Trained


@dataclass(frozen=True)
class Estimated:
    """The slots; of how many images (or recordings, as they are `called`) they are means, and of how many tokens of
    each. `registers`: of test time, that they stand for (`operations.registers`)."""

    fold: Fold
    images: int
    tokens: float
    called: Called = IMAGE
    registers: Mapping[str, Any] | None = None


class EstimatedBias(Operation):
    """Give an encoder slots k', v' at every attention site: mean keys and values of tokens that act as biases.

    `from`: "registers" that were trained, each of which becomes a slot and is left out; or "massive_tokens", those that
    stand out most against the others of their image (`survey.patches.Standing`), which stay where they are.
    """

    name: ClassVar[str] = "attention_bias"
    told_by: ClassVar[str | None] = "from"
    example: ClassVar[str] = "{from: registers}"
    adds: ClassVar[bool] = True
    reading: ClassVar[Port | None] = "images"

    source: Annotated[
        Literal["registers", "massive_tokens"],
        Field(
            alias="from", examples=["registers"],
            description="which tokens: trained registers, which are then left out, or those that stand out most",
        ),
    ]  # fmt: skip

    _made: bool = PrivateAttr(False)  # the registers are those of `registers`, which stands before it

    def of_made(self) -> EstimatedBias:
        """The same behind `registers`, whose token becomes a slot."""
        copied = self.model_copy()
        copied._made = True
        return copied

    @model_validator(mode="before")
    @classmethod
    def _of_no_prefix(cls, value: Any) -> Any:
        if isinstance(value, dict) and (other := next((key for key in value if key != "from"), None)):
            raise ValueError(f"is there, beside which '{other}' means nothing; remove one of them")
        return value

    @property
    def exact(self) -> Exact:
        return "no"

    @property
    def inexact(self) -> str:
        return "attention_bias.from"

    @property
    def reads(self) -> str | None:
        return "attention_bias takes its means"

    def plan(self, target: Target, parts: Estimated | None = None) -> Changes:
        anatomy, patching = target.anatomy, _patching(target.anatomy)
        n, emptied = 1, Emptied()
        if self.source == "registers" and not self._made:
            if patching.is_text:
                raise UnsupportedModel(
                    f"{anatomy.model_type}: reads text, which has no registers; give 'from: massive_tokens'"
                )
            if not patching.registers:
                raise UnsupportedModel(
                    f"{anatomy.model_type}: has no registers by its config; put the operation 'registers' in front, "
                    "or give 'from: massive_tokens'"
                )
            n, emptied = patching.registers, without_registers(anatomy)
        slots = count_of(n, "slot")
        return Changes(
            added={
                f"{anatomy.lead}{name}": Stored("F32", shape)
                for name, shape in every_shape(anatomy.eab(n, "always")).items()
            },
            replaced={
                (stored := stored_name(target.layout, anatomy, name)): {
                    stored: Stored(target.layout.tensors[stored].dtype, shape)
                }
                for name, shape in emptied.tensors.items()
            },
            config={"eab": eab_config(anatomy, (), "always", n), **emptied.config},
            parts=frozenset({"slots"}),
            told={"n_slots": n, "registers_left_out": n if emptied.tensors else 0},
            words=(
                f"{slots} in each of {count_of(len(anatomy.sites), 'attention site')}",
                *([f"in place of {count_of(n, 'register')}"] if emptied.tensors else []),
            ),
            trains=(Trained("slots", n, f"{slots} at each site", "the slots"),),
        )

    def fit(self, live: Live, text: Fitting) -> Estimated:
        patching, rows = _patching(live.anatomy), text.chunks
        text.reporter.step(f"take means over {len(rows)} {patching.called.many}")
        made = text.earlier["registers"].entry if self._made else None
        with text.reporter.bar("means", None) as advance, contextlib.ExitStack() as meanwhile:
            if made is not None:
                meanwhile.enter_context(install_registers(live.trunk, made))
                means, tokens = Means(live, lambda image: [[made["at"]]]), 1.0
            elif self.source == "registers":
                groups = [[register] for register in range(1, 1 + patching.registers)]
                means, tokens = Means(live, lambda image: groups), float(len(groups))
            else:
                standing = Standing()
                stream(live, rows, [standing], advance=advance, what="which tokens stand out")
                chosen = standing.chosen()
                if not any(chosen):
                    raise NothingToDo(
                        f"no token of a calibration {patching.called.one} stands out against the others, so there is "
                        "none to take means of; leave attention_bias out"
                    )
                means, tokens = Means(live, lambda image: [chosen[image]]), sum(map(len, chosen)) / len(chosen)
            stream(live, rows, [means], advance=advance, what="means")
        like = next(live.trunk.parameters())
        return Estimated(Fold((), means.tensors(like), "always"), len(rows), tokens, patching.called, made)

    @contextlib.contextmanager
    def graft(self, live: Live, parts: Estimated) -> Iterator[None]:
        with grafted(live, parts.fold), contextlib.ExitStack() as undo:
            if parts.registers is not None:
                units = parts.registers["units"]
                undo.enter_context(reversibly(live, lambda: install_silence(live.trunk, units)))
            elif self.source == "registers":
                stop = 1 + _patching(live.anatomy).registers
                undo.enter_context(reversibly(live, lambda: left_out(live, 1, stop)))
            yield

    def held(self, live: Live, parts: Estimated) -> Estimated:
        return replace(parts, fold=held_parts(live, parts.fold))

    def tensors(self, live: Live, parts: Estimated) -> Mapping[str, torch.Tensor]:
        return {
            f"{live.anatomy.lead}{name}": tensor.to("cpu", torch.float32).contiguous()
            for name, tensor in parts.fold.tensors.items()
        }

    def rewrite(
        self, parts: Estimated, target: Target, stored: str, weight: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Registers that are left out: the same tensor without rows."""
        return {stored: weight.new_empty(self.plan(target).replaced[stored][stored].shape)}

    def found(self, parts: Estimated, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        n = parts.fold.n
        read = {parts.called.many: parts.images, "tokens": parts.tokens}
        return {"estimated": {"from": self.source, "n_slots": n, **read}}

    @classmethod
    def sentence(cls, verdict: Mapping[str, Any]) -> str | None:
        if not (found := verdict.get("estimated")):
            return None
        read = called(found)
        what = "register" if found["from"] == "registers" else "token that stands out"
        return (
            f"{count_of(found['n_slots'], 'slot')} at each site: mean keys and values of "
            f"{'each ' if found['n_slots'] > 1 else 'the '}{what}, over {count_of(found[read.many], read.one)}."
        )

    def says(self, parts: Estimated, target: Target, recipe: Stand) -> Section:
        n, sites = parts.fold.n, len(target.anatomy.sites)
        of, left = "tokens that stand out against all others", ""
        if self._made:
            of = "a test-time register"
        elif self.source == "registers":
            of = count_of(n, "register")
            left = (
                f" The registers themselves are left out: an {parts.called.one} becomes as many tokens fewer, and what "
                "read them from the output finds none."
            )
        trained = ", then tuned" if recipe.tuned else ""
        return Section(
            tag="attention-bias",
            title="explicit attention bias",
            adds="slots",
            text=f"an **explicit attention bias**: {count_of(n, 'constant key/value pair')} k', v' in each of {sites} "
            f"attention sites, the mean keys and values of {of} over {parts.images} calibration {parts.called.many}"
            f"{trained}. In an encoder such tokens see the {parts.called.one}, so this is an estimate: what was "
            f"measured says how near it is.{left}",
            limits="Rows of `output_attentions` sum to less than 1: the rest is the slots'. Inside "
            "`with model.slot_attentions():` they have columns of their own, in front.",
        )


def _patching(anatomy: Anatomy) -> Patching:
    if anatomy.patching is None:
        raise UnsupportedModel(
            f"{anatomy.model_type}: is no encoder, and of a language model's prefix slots are exact; give 'prefix'"
        )
    if not anatomy.sees_all:
        raise UnsupportedModel(
            f"{anatomy.model_type}: its tokens see only those before them, and of a prefix slots are exact; give "
            "'prefix'"
        )
    return anatomy.patching


class Means(Observer):
    """Mean key (n, H, D) and value (n, H, E) at each site, over images.

    `groups`: of the image of a number, the tokens (places) of each slot, which give their mean to it; none, where the
    image has nothing to say of it.
    """

    def __init__(self, live: Live, groups: Callable[[int], Sequence[Sequence[int]]]) -> None:
        self.names = {live.trunk.get_submodule(site.name): site.name for site in live.anatomy.sites}
        self.groups = groups
        self.sums: dict[str, dict[int, torch.Tensor]] = {}  # by name, by slot
        self.images: Counter[tuple[str, int]] = Counter()
        self.seen: Counter[str] = Counter()  # images by site

    def attention(self, block: int, call: Call, batch: Batch) -> None:
        name = self.names[call.module]
        for image, (key, value) in enumerate(zip(call.key, call.value, strict=True), self.seen[name]):
            for slot, tokens in enumerate(self.groups(image)):
                if tokens:
                    self._add(f"{name}.attention_bias.key", slot, key[:, tokens])
                    self._add(f"{name}.attention_bias.value", slot, value[:, tokens])
        self.seen[name] += len(call.key)

    def _add(self, name: str, slot: int, states: torch.Tensor) -> None:
        """states (H, tokens, D) of one image."""
        mean, sums = states.double().mean(dim=1).cpu(), self.sums.setdefault(name, {})
        sums[slot] = sums[slot] + mean if slot in sums else mean
        self.images[name, slot] += 1

    def tensors(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name within the trunk -> (n, H, D), of the dtype and on the device of `like`."""
        return {
            name: torch.stack([total / self.images[name, slot] for slot, total in sorted(sums.items())]).to(like)
            for name, sums in self.sums.items()
        }
