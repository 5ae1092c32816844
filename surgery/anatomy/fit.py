"""Whether the tensors of a checkpoint are those of the model that its config describes: judged from headers alone.

transformers itself is asked: it loads tensors that have names, shapes and no values, on the meta device. So they are
renamed, joined and tied as they will be when the weights are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.allowance import Allowance, within
from ..checkpoint.config import CONFIG, require_countable
from ..checkpoint.layout import Layout
from ..checkpoint.reading import without_values
from ..errors import DamagedCheckpoint, SurgeryError, brief
from ..words import count_of, named
from .encoders import examine_encoder
from .packed import from_headers, require_patterns, require_plain_sites
from .patching import Reads
from .quiet import quiet
from .sites import ADDED, Anatomy, examine

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")
# A head of encoders that some classes have and checkpoints of others lack; nothing here reads it.
POOLER = re.compile(r"(^|\.)pooler\.")
SPARE_BUFFERS = 2**28  # elements of tables that a model makes for itself, beside those that it stores


@dataclass(frozen=True)
class Fit:
    """How tensors and model go together, where they do.

    `unused`: tensors that the class has no place for and that transformers leaves out. `tied`: pairs of names which the
    config ties, and which are both stored; where they differ, transformers takes each as it is stored.
    """

    unused: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()

    def notes(self, anatomy: Anatomy) -> list[str]:
        """What there is to know about it, a sentence each."""
        found = []
        if self.unused:
            found.append(
                f"not part of {anatomy.model_class.__name__}: {count_of(len(self.unused), 'tensor')}, first "
                f"{named(self.unused[0])}; kept byte for byte, and no loader of this class reads them"
            )
        for target, source in self.tied:
            found.append(
                f"config.json ties {target} to {source}, and both are stored: where they differ, {target} counts as it "
                "is stored, and nothing is tied"
            )
        return found


def examine_stored(config: dict, layout: Layout) -> tuple[Anatomy, Fit]:
    """The anatomy of the model that `config` describes, and how the tensors of `layout` fit it.

    Bounded by the number of these tensors, whatever the config asks for. Raises DamagedCheckpoint where the two do not
    fit, and otherwise what `examine` raises.
    """
    require_countable(config, layout.tensors, layout.root / CONFIG)
    with quiet():
        anatomy = examine(config, tensors=len(layout.tensors))
    return anatomy, fit(anatomy, layout)


def encoder_stored(config: dict, layout: Layout, reads: Reads | None = None) -> tuple[Anatomy, Fit]:
    """The same of an encoder, of those that there are the one that `reads` this (`examine_encoder`)."""
    require_countable(config, layout.tensors, layout.root / CONFIG)
    with quiet():
        anatomy = examine_encoder(config, reads)
    return anatomy, fit(anatomy, layout)


def original_tensors(layout: Layout) -> Layout:
    """The layout of a converted checkpoint without what operations added to its sites."""
    own = {name: info for name, info in layout.tensors.items() if not any(part in ADDED for part in name.split("."))}
    return Layout(layout.root, own, layout.shards, layout.sizes)


def fit(anatomy: Anatomy, layout: Layout) -> Fit:
    """How the tensors of `layout` fit the model of `anatomy`; DamagedCheckpoint where they do not."""
    _require_buffers(anatomy.blank, layout)
    require_patterns(anatomy.config, anatomy.blank)
    layout, config = from_headers(layout, anatomy.blank, anatomy.config)
    model, report = _loaded(anatomy, layout, config)
    require_plain_sites(model, (f"{anatomy.lead}{site.name}" for site in anatomy.sites))
    unexpected = set(report["unexpected_keys"])
    wrong = belonging(model, unexpected, layout.tensors.keys() - unexpected)
    if unexpected >= layout.tensors.keys():
        known = f"a name that {anatomy.model_class.__name__} knows"
        raise _unfit(layout, f"none has {known}, the first is {named(min(unexpected))}", 1)
    missing = [name for name in report["missing_keys"] if POOLER.search(name) is None]
    kinds = (("is missing", missing), ("has no place in the model", wrong))
    if mismatched := sorted(report["mismatched_keys"], key=str):
        name, stored, asked = mismatched[0]
        raise _unfit(
            layout, f"{named(name)} is stored as {tuple(stored)} and should be {tuple(asked)}", len(mismatched)
        )
    if errors := [*report.get("error_msgs", ()), *dict(report.get("conversion_errors") or {}).values()]:
        raise _unfit(layout, f"transformers says {named(errors[0], 120)}", len(errors))
    for said, names in kinds:
        if names:
            raise _unfit(layout, f"{named(min(names))} {said}", len(names))
    ignored = [name for name in layout.tensors if _is_ignored(model, name)]
    return Fit(tuple(sorted({*unexpected, *ignored})), _tied(model, layout))


def _loaded(anatomy: Anatomy, layout: Layout, config: PreTrainedConfig) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model as transformers loads it from these names and shapes, on the meta device, and its report."""
    kind: Any = anatomy.model_class
    empty = without_values(layout)
    try:
        with quiet(), within(Allowance.of(len(empty))):
            return kind.from_pretrained(
                None, config=config, state_dict=empty, dtype=torch.bfloat16, device_map="meta",
                output_loading_info=True, ignore_mismatched_sizes=True, attn_implementation="eager",
            )  # fmt: skip
    except SurgeryError:
        raise
    except Exception as error:  # whatever transformers raises on them, it could not load the weights either
        raise _unfit(layout, f"transformers says {brief(error)}", 1) from error


def _unfit(layout: Layout, what: str, count: int) -> DamagedCheckpoint:
    more = f", and {count - 1:,} more are wrong" if count > 1 else ""
    return DamagedCheckpoint(
        f"{layout.root}: its tensors do not fit its {CONFIG}: {what}{more}; correct {CONFIG} or download it again."
    )


def belonging(model: PreTrainedModel, names: Iterable[str], used: Collection[str] = ()) -> list[str]:
    """Those of `names`, which `model` has no place for, that are parts of it all the same by what they are called.

    A tensor of another layer of the model's own stack (the config says too few layers), or another tensor of one of its
    layers that hold tensors (a bias that the config leaves out). All others are foreign. `used`: names of tensors that
    did find a place, as the checkpoint spells them.
    """
    known = {_INDEX.sub("#", name) for name in (*model.state_dict(), *used)}
    parts = {name for name, part in model.named_modules() if any(True for _ in part.parameters(recurse=False))}
    return [
        name
        for name in names
        if not _predicts_ahead(model, name)
        and (_INDEX.sub("#", name) in known or name.rpartition(".")[0] in parts and not _is_ignored(model, name))
    ]


def _predicts_ahead(model: PreTrainedModel, name: str) -> bool:
    """Whether the tensor is of a layer for predicting several tokens, which some checkpoints number after the last."""
    config: Any = model.config.get_text_config()
    ahead, layers = getattr(config, "num_nextn_predict_layers", None), getattr(config, "num_hidden_layers", None)
    index = _INDEX.search(name)
    return isinstance(ahead, int) and isinstance(layers, int) and index is not None and (
        layers <= int(index.group()) < layers + ahead
    )  # fmt: skip


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers passes over a tensor of this name without a word."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns) and name not in model.state_dict()


def _tied(model: PreTrainedModel, layout: Layout) -> tuple[tuple[str, str], ...]:
    lead = f"{model.base_model_prefix}."

    def is_stored(name: str) -> bool:
        return name in layout.tensors or name.removeprefix(lead) in layout.tensors

    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return tuple((a, b) for a, b in pairs.items() if is_stored(a) and is_stored(b))


def _require_buffers(blank: PreTrainedModel, layout: Layout) -> None:
    """DamagedCheckpoint where the model would make tables for itself that are larger than all that is stored."""
    made = sum(buffer.numel() for buffer in blank.buffers())
    if made > max(SPARE_BUFFERS, 2 * layout.total_bytes):
        raise DamagedCheckpoint(
            f"{layout.root / CONFIG} asks for tables of {made:,} numbers (max_position_embeddings?), and all its "
            f"tensors have {layout.total_bytes:,} bytes; correct it, or download the checkpoint again."
        )
