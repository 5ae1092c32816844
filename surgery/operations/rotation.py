"""Rotate the residual stream: a rotation merged into the weights on both sides of it, the same function to rounding.

QuaRot's R1 (Ashkboos et al. 2024a, arXiv 2404.00456) by SliceGPT's computational invariance (Ashkboos et al. 2024b,
arXiv 2401.15024): a norm without a weight commutes with a rotation, so what writes to the stream is turned and what
reads it is turned back, and a channel that was large is spread over all of them. With `heads`, values of each head are
rotated where they are written and back where they are read (QuaRot's R2). Which weights those are is found and proved
on the model itself (`symmetry`, `turning`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.sites import ADDED
from ..anatomy.stored import find_stored, stored_name
from ..checkpoint.layout import Stored
from ..converted.card import Section
from ..converted.described import Described, damaged
from ..errors import UnsupportedModel
from ..live.graft import on_the_seam
from ..live.loading import require_in_memory
from ..live.model import Live
from ..live.parts import OUTSIDE, Part, parts
from ..words import count_of
from .base import Changes, Exact, Fitting, Operation, Port, Stand, Target
from .orthogonal import hadamard, rotation_matrix
from .symmetry import Way, following, heads
from .turning import LOUD, ROUNDING, Change, folding, proved, turning, turning_heads

TRIED = (4, 32)  # rows and tokens of the random text that parts are tried on
UNTIED = "untied"  # key of config.json: what was added because it no longer equals another tensor, [dtype, shape]
_ENTRY: TypeAdapter[dict[str, tuple[str, tuple[int, ...]]]] = TypeAdapter(dict[str, tuple[str, tuple[int, ...]]])


@dataclass(frozen=True)
class Turns:
    """What becomes of weights, one after another; names are those of the causal LM.

    `apart`: names under which a tensor was tied to another and no longer is. `kind` is that of the stream's matrix.
    Values of heads are rotated at `sites` attention sites.
    """

    changes: tuple[Change, ...]
    apart: tuple[str, ...]
    kind: Literal["hadamard", "random"]
    sites: int


@dataclass(frozen=True)
class Rotated:
    """The turns, and by their names in the causal LM what a checkpoint stores of them: `turned`, and `added` beside.

    `slots`: those of an attention bias that have turned too.
    """

    turns: Turns
    turned: tuple[str, ...]
    slots: tuple[str, ...]
    added: Mapping[str, Stored]


class Rotation(Operation):
    """Rotate the residual stream, so that what is large in one channel is spread over all: the same function.

    `kind`: "hadamard" is a Hadamard matrix with random signs, or where there is none of the size any orthogonal matrix;
    "random" is any. `heads`: rotate the values of each head too. `seed`: of the signs, or of the matrix. A checkpoint
    in half precision rounds anew what has turned: 4e-4 nats per token on SmolLM2. The equivalence gate must allow it.
    """

    name: ClassVar[str] = "rotation"
    reading: ClassVar[Port | None] = "text"

    kind: Annotated[
        Literal["hadamard", "random"], Field(description="a Hadamard matrix with random signs, or any orthogonal one")
    ] = "hadamard"
    heads: Annotated[bool, Field(description="rotate the values of each head too")] = True
    seed: Annotated[int, Field(ge=0, description="of the signs, or of the matrix")] = 0

    @property
    def exact(self) -> Exact:
        return "rounding"

    @property
    def changes_weights(self) -> bool:
        return True

    def plan(self, target: Target, parts: Rotated | None = None) -> Changes:
        """Any weight of a block may change, and any as wide as the stream; what is tied may have to be untied.

        UnsupportedModel where one that is as wide is not stored as the model has it.
        """
        layout, anatomy = target.layout, target.anatomy
        if parts is not None:
            turned = {stored_name(layout, anatomy, name): "changed" for name in parts.turned}
            return _changes(turned, parts.added, untied=bool(parts.turns.apart))
        width = anatomy.config.get_text_config().hidden_size
        blocks = tuple(f"{anatomy.lead}{block}." for block in anatomy.blocks)
        found: dict[str, str] = {}
        for names in names_of_tensors(anatomy.blank):
            wide = width in anatomy.blank.get_parameter(names[0]).shape
            stored = [name for name in names if _is_stored(target, name)]
            if wide and not stored:
                stored_name(layout, anatomy, names[0])  # raises
            if wide or names[0].startswith(blocks):
                found |= {stored_name(layout, anatomy, name): "may change" for name in stored}
        added = _not_stored(target)
        return _changes(found, added, untied=bool(added))

    def require(self, live: Live) -> None:
        require_in_memory(live.model, "rotation")

    def fit(self, live: Live, text: Fitting) -> Rotated:
        text.reporter.step("rotate the residual stream")
        turns, target = turns_of(live, self), text.target
        names = tuple(dict.fromkeys(name for name, _ in turns.changes))
        slots = tuple(name for name in names if _is_added(name))
        tied = {name for names in names_of_tensors(live.model) if len(names) > 1 for name in names}
        turned = [name for name in names if name not in slots and (name not in tied or _is_stored(target, name))]
        stored = {target.layout.tensors[stored_name(target.layout, target.anatomy, name)].dtype for name in turned}
        if halves := sorted(stored & {"BF16", "F16"}):
            text.reporter.note(f"what has turned is rounded anew to {halves[0]}, which the equivalence gate will see")
        added = _not_stored(target) if turns.apart else {}
        untied = f"; {next(iter(added))} is no longer tied to the embeddings, and is added" if added else ""
        text.reporter.note(f"{len(turned)} tensors turned, values of heads at {turns.sites} sites{untied}")
        return Rotated(turns, tuple(turned), slots, added)

    def graft(self, live: Live, parts: Rotated) -> contextlib.AbstractContextManager[object]:
        turn(live, parts.turns)
        return contextlib.nullcontext()

    def tensors(self, live: Live, parts: Rotated) -> Mapping[str, torch.Tensor]:
        names = (*parts.turned, *parts.slots, *parts.added)
        return {name: live.model.get_parameter(name).detach() for name in names}

    def remembered(self, parts: Rotated) -> Rotated:
        return replace(parts, turns=replace(parts.turns, changes=()))

    @classmethod
    def asks(cls, described: Described) -> Mapping[str, Mapping[str, Stored]]:
        if UNTIED not in described.config:
            return {}
        try:
            entry = _ENTRY.validate_python(described.config[UNTIED])
        except ValidationError as error:
            raise damaged(described.root, f"{UNTIED} does not say dtypes and shapes of tensors") from error
        return {"untied embeddings": {name: Stored(dtype, shape) for name, (dtype, shape) in entry.items()}}

    def says(self, parts: Rotated, target: Target, recipe: Stand) -> Section:
        kind = "a Hadamard matrix with random signs" if parts.turns.kind == "hadamard" else "a random orthogonal matrix"
        heads = count_of(parts.turns.sites, "attention site")
        apart = " The output layer is no longer tied to the embeddings: the last norm's weight is in it alone."
        return Section(
            text=f"Its residual stream is rotated by {kind}, and so are the values of the heads at {heads}. "
            f"{len(parts.turned):,} tensors have turned with them, and layers after norms hold the norms' weights: the "
            f"same function.{apart if parts.added else ''}"
        )


# ---- found on the model, and done


def turns_of(live: Live, settings: Rotation) -> Turns:
    """How the model turns; it is left as it was. UnsupportedModel where that cannot be proved, part by part."""
    dtype = next(live.model.parameters()).dtype
    if dtype not in ROUNDING:
        raise UnsupportedModel(f"a rotation is proved in float32 or float64, and the model is in memory as {dtype}.")
    with torch.inference_mode(False), on_the_seam(live):
        every = parts(live, _random_text(live))
        ways = [_way(live, part) for part in every]
        width, fixing = every[0].width, any(way.fixing for way in ways)
        rotation = rotation_matrix(width, settings.kind, settings.seed, fixing).to(live.device)
        changes: list[Change] = []
        sites = 0
        for part, way in zip(every, ways, strict=True):
            turns = [*folding(way.gains, part.weights), *turning(way.sides, rotation)]
            if not proved(part, turns, rotation):
                raise _refused(live, f"{part.name} with its weights turned is another function")
            of_heads = _turns_of_heads(live, part, settings) if settings.heads and part.name != OUTSIDE else []
            changes += [*turns, *(change for site in of_heads for change in site)]
            sites += len(of_heads)
    tied = [(first, other) for first, *others in names_of_tensors(live.model) for other in others]
    apart = tuple(other for first, other in tied if ways[-1].of(first) != ways[-1].of(other))
    return Turns(tuple(changes), apart, settings.kind if hadamard(width) is not None else "random", sites)


@torch.no_grad()
def turn(live: Live, turns: Turns) -> None:
    """Change the model's weights in place, as found; slots that are grafted among them."""
    for name in turns.apart:
        home, _, leaf = name.rpartition(".")
        weight = live.model.get_parameter(name)
        setattr(live.model.get_submodule(home), leaf, nn.Parameter(weight.clone(), weight.requires_grad))
    if turns.apart:
        live.model.config.tie_word_embeddings = False
    weights = dict(live.model.named_parameters())
    for name, change in turns.changes:
        if name in weights:  # else it is another name of a tensor, which has turned
            weights[name].copy_(change(weights[name]))


def _random_text(live: Live) -> torch.Tensor:
    vocabulary = live.model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, TRIED, generator=torch.Generator().manual_seed(0)).to(live.device)
    padding = getattr(live.model.get_input_embeddings(), "padding_idx", None)  # its row gets no gradient
    return tokens if padding is None else torch.where(tokens == padding, (padding + 1) % vocabulary, tokens)


def _way(live: Live, part: Part) -> Way:
    way = following(part)
    if isinstance(way, str):
        raise _refused(live, way)
    return way


def _turns_of_heads(live: Live, part: Part, settings: Rotation) -> list[list[Change]]:
    """For each site of the part whose values can be rotated, what that changes."""
    found = []
    for site in heads(live, part):
        rotation = rotation_matrix(site.dim, settings.kind, settings.seed, fixing=False).to(live.device)
        if proved(part, turning_heads(site, rotation, LOUD)):
            found.append(turning_heads(site, rotation))
    return found


def _refused(live: Live, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{live.anatomy.model_type}: {reason}, so the stream cannot be rotated; leave rotation out."
    )


# ---- names


def names_of_tensors(model: PreTrainedModel) -> list[list[str]]:
    """Every parameter by all of its names; a tied one has several."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def _is_stored(target: Target, name: str) -> bool:
    return find_stored(target.layout, target.anatomy, name.removeprefix(target.anatomy.lead)) is not None


def _is_added(name: str) -> bool:
    return any(part in ADDED for part in name.split("."))


def _not_stored(target: Target) -> dict[str, Stored]:
    """Names of tied tensors that the checkpoint leaves out, with dtype and shape of what it stores of each."""
    found: dict[str, Stored] = {}
    for names in names_of_tensors(target.anatomy.blank):
        if stored := [name for name in names if _is_stored(target, name)]:
            info = target.layout.tensors[stored_name(target.layout, target.anatomy, stored[0])]
            found |= {name: Stored(info.dtype, info.shape) for name in names if name not in stored}
    return found


def _changes(changed: Mapping[str, str], added: Mapping[str, Stored], untied: bool) -> Changes:
    entry = {UNTIED: {name: [stored.dtype, list(stored.shape)] for name, stored in added.items()}} if added else {}
    return Changes(
        added=added,
        changed=changed,
        config={"tie_word_embeddings": False, **entry} if untied else {},
        words=("an output layer of its own, no longer tied to the embeddings",) if added else (),
    )
