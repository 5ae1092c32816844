"""What a run would write from the source once more, held against a converted checkpoint that is there.

Nothing is listed by hand: the files beside the weights are emitted anew and compared byte for byte, and operations are
fitted anew as far as they follow from the source alone. What text or training decided cannot be had again: the
manifest's hashes hold it, and what seals the manifest.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..anatomy.stored import stored_values
from ..checkpoint.layout import Layout, read_layout, read_tensor
from ..checkpoint.manifest import Manifest
from ..checkpoint.source import Source
from ..checkpoint.values import as_stored
from ..converted.described import Described
from ..converted.files import added_layout
from ..converted.reading import live_converted
from ..errors import DamagedCheckpoint, NoSpace, NoTemporary, SurgeryError
from ..live.loading import live_original, load_tokenizer
from ..live.memory import Place
from ..live.port import port_of
from ..live.roundings import rounds_values, steady
from ..operations.base import Changes, Fitting, Operation, Parts
from ..progress import Reporter
from ..verification.checks import Check, Found, check
from ..verification.equivalence import Control, compare_random_ids, take_control
from ..words import listing
from .again_files import other_versions, same_files_again
from .again_quantised import same_quantised
from .operate import collect, comparable
from .plan import Plan, plan_on
from .recipe import Recipe

FILES, TENSORS, QUANTISED, FUNCTION = "files again", "tensors again", "quantised again", "function again"
# By how much of the largest entry of its row an entry may differ: what float32 makes of another order of summation in
# a deep model, on another machine. SmolLM2's slots differ from those in float64 by up to 2^-13.5, at the median 2^-19.
ROUNDING = 2.0**-10
# Rounding spreads: what differs in one layer differs in all after it. So few entries that differ were changed by hand.
SPREAD = 0.01


@dataclass(frozen=True)
class Again:
    """What was fitted anew: the plan, what is done, and the tensors by their names in the checkpoint.

    `left`: the operations that were not, the last of the recipe.
    """

    plan: Plan
    changes: Changes
    tensors: Mapping[str, torch.Tensor]
    left: Sequence[Operation]
    control: Control | None  # what the original answers, where those must leave its function as it is

    @property
    def open(self) -> set[str]:
        """Names of tensors that those may have added or changed."""
        by_operation = self.plan.by_operation
        names = {
            name for one in self.left for part in ("added", "changed") for name in getattr(by_operation[one.name], part)
        }
        return names | (set(self.changes.added) if self.plan.recipe.tune is not None else set())


def check_again(
    described: Described, manifest: Manifest, recipe: Recipe, source: Source, directory: Path, place: Place,
    reporter: Reporter,
) -> list[Check]:  # fmt: skip
    """Whether the checkpoint that `described` is of holds what `recipe` makes of `source` (plain files in `directory`).

    NoSpace where the source does not fit into memory.
    """
    try:
        again = fit_again(described, recipe, source, directory, place, reporter)
    except (NoSpace, NoTemporary):
        raise
    except SurgeryError as error:  # the recipe or config.json of the checkpoint says what cannot be done
        return [Check(FILES, False, str(error))]
    reporter.step("compare what was written with what a run would write")
    files = check(FILES, lambda: same_files_again(described.root, again, directory))
    if not files.passed and (others := other_versions(manifest)):
        files = replace(files, detail=f"{files.detail}; {others}")
    found = [files, check(TENSORS, lambda: _same_tensors(described.root, manifest, again, directory))]
    if again.changes.replaced or any(entry.status in ("quantised", "emptied") for entry in manifest.tensors.values()):
        found.append(check(QUANTISED, lambda: same_quantised(described, manifest, again, directory)))
    if again.control is not None:
        found.append(check(FUNCTION, functools.partial(_same_function, described, again.control, place)))
    return found


def fit_again(
    described: Described, recipe: Recipe, source: Source, directory: Path, place: Place, reporter: Reporter
) -> Again:  # fmt: skip
    """Plan `recipe` on the source, and fit its operations, up to the first that text or training decides."""
    operations = tuple(operation.as_found(described) for operation in recipe.operations)
    recipe = recipe.model_copy(update={"operations": operations})
    plan = plan_on(source, recipe, None, needs_tokenizer=False, reads=described.anatomy.reads)
    if source.kind == "gguf" and plan.target.tokenizer is not None:
        plan = replace(plan, target=replace(plan.target, tokenizer=load_tokenizer(directory)))
    changes = plan.recipe.changes
    repeated = next((i for i, change in enumerate(changes) if not change.repeats), len(changes))
    asked, control = repeated < len(changes) and recipe.exact, None
    parts: dict[str, Parts] = {}
    tensors: dict[str, torch.Tensor] = {}
    # Of what is trained there is nothing left to compare.
    if asked or repeated and (recipe.tune is None or recipe.changes_weights):
        reporter.step("fit the operations again, from the source")
        live = live_original(directory, plan.anatomy, place, plan.fitting_dtype, port_of(plan.anatomy))
        # Slots as they are stored are not exact enough to tell where values are rounded.
        asked = asked and live.port.predicts and not rounds_values(live.model)
        if asked:
            control = take_control(live, described.eab.prefix_ids, comparable(live, changes))
        with contextlib.ExitStack() as grafts:
            grafts.enter_context(steady(live.model))
            for change in changes[:repeated]:
                planned = plan.by_operation[change.name]
                fitting = Fitting(plan.target, planned, None, reporter, {**parts}, None, 0.0, directory)
                parts[change.name] = change.fit(live, fitting)
                grafts.enter_context(change.graft(live, parts[change.name]))
            tensors = collect(live, changes[:repeated], parts)
        del live
        gc.collect()
    final = plan.final(parts)
    _, infos = added_layout(final.added, plan.added_shard)
    added = {name: as_stored(infos[name], tensor) for name, tensor in tensors.items() if name in infos}
    weights = {name: tensor for name, tensor in tensors.items() if name not in infos}
    stored = stored_values(replace(source.layout, root=directory), plan.anatomy, weights)
    return Again(plan, final, {**added, **stored}, changes[repeated:], control)


# ---- tensors


def _same_tensors(root: Path, manifest: Manifest, again: Again, directory: Path) -> Found:
    """What was fitted again is what is stored, but for rounding; and what was not is said."""
    layout, spec, left = read_layout(root), again.plan.source.spec, again.open
    left |= set(again.changes.replaced)  # which are looked at by themselves
    compared = {name: tensor for name, tensor in again.tensors.items() if name not in left}
    entries = differing = to_the_bit = 0
    furthest, where = 0.0, ""
    for name, wanted in compared.items():
        found = _read(layout, name)
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            return False, f"{name} is {found.dtype} of shape {tuple(found.shape)}, computed again it is not"
        distance = 0.0 if torch.equal(found, wanted) else _distance(found, wanted)
        if not distance <= ROUNDING:
            return False, f"{name} is not what is computed again from {spec} (off by {distance:.2g})"
        to_the_bit += torch.equal(found, wanted)
        furthest = max(furthest, distance)
        if found.dtype == torch.float32:  # in half precision rounding shows in few entries
            unequal = int((found != wanted).sum())
            entries, differing, where = entries + found.numel(), differing + unequal, name if unequal else where
    if 0 < differing < max(2, SPREAD * entries):
        said = f"{differing} of {entries:,} entries are not what is computed again, and all others are to the bit"
        return False, f"{where}: {said}, so it is no rounding"
    if made := _not_made(layout, manifest, again, directory, compared):
        return False, made
    told = f"{len(compared)} tensors as computed again from {spec}"
    if not compared:
        told = f"no tensor follows from {spec} alone"
    elif to_the_bit == len(compared):
        told += ", to the bit"
    else:
        told += f", {to_the_bit} to the bit, others off by {furthest:.1g} of a row's largest entry, as rounding is"
    if not again.left:
        return True, told
    names = listing([operation.name for operation in again.left], 8)
    of = again.plan.anatomy.reads
    note = f"what {names} made of {of} cannot be computed again: the manifest alone holds it, if it is sealed"
    return True, f"{told}; {note}", (note,)


def _same_function(described: Described, control: Control, place: Place) -> Found:
    """The checkpoint as it is loaded answers as the original does, which a tensor by itself cannot show."""
    live = live_converted(described.root, described.anatomy, place)
    found = compare_random_ids(live, control)
    worst = max(value for value in (found.plain, found.padded, found.cached) if value is not None)
    return True, f"on random ids the original's after the same prefix, within {worst:.2g} in log-probability"


def _not_made(
    layout: Layout, manifest: Manifest, again: Again, directory: Path, compared: Mapping[str, torch.Tensor]
) -> str | None:  # fmt: skip
    """A tensor that is said to be changed, and that no operation of the recipe makes like this, as a sentence."""
    original = read_layout(directory)
    for name, entry in manifest.tensors.items():
        if entry.status != "changed" or name in compared:
            continue
        makers = [
            change for change in again.plan.recipe.changes if name in again.plan.by_operation[change.name].changed
        ]
        if not makers:
            return f"{name} is said to be changed, and no operation of the recipe changes it"
        if len(makers) == 1 and not makers[0].could_make(_read(original, name), _read(layout, name)):
            return f"{name} is not what {makers[0].name} makes of it, whatever the text"
    return None


def _read(layout: Layout, name: str) -> torch.Tensor:
    if name not in layout.tensors:
        raise DamagedCheckpoint(f"{name} is missing, and computed again it is there")
    return read_tensor(layout, name)


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference as a share of the largest entry of its row, less what storing in half precision rounds."""
    a, b = found.double(), wanted.double()
    row = b.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    step = torch.finfo(wanted.dtype).eps if wanted.dtype in (torch.float16, torch.bfloat16) else 0.0
    return (((a - b).abs() - step * b.abs()).clamp(min=0) / row).max().nan_to_num(nan=float("inf")).item()
