"""What a verb was given, as provenance: for the manifest, the verdict, the card and the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.provenance import Cut, Cuts, Provenance, TextFiles, command_line, name_of, plain, versions

DTYPE = "float32"  # models are loaded in it, whatever their files hold
_SOURCE = ("spec", "kind", "revision", "dtype", "sha256")


def provenance(
    date: str,
    *,
    command: Sequence[str],
    device: str,
    files: TextFiles,
    evaluation: torch.Tensor | None = None,
    calibration: torch.Tensor | None = None,
    hub_ids: Collection[str] = (),
) -> Provenance:
    """The provenance of an act that began at `date`; `evaluation` (N, T) and `calibration` (M, T), or pixels, are what
    was read.

    `hub_ids` are arguments of `command` that look like paths and are none.
    """
    return Provenance(
        date=date, command=command_line(command, hub_ids), device=plain(device), dtype=DTYPE, versions=versions(),
        texts=files, chunks=Cuts(evaluation=_cut(evaluation), calibration=_cut(calibration)),
    )  # fmt: skip


def _cut(chunks: torch.Tensor | None) -> Cut | None:
    if chunks is None:
        return None
    return Cut(count=len(chunks), length=chunks.shape[1] if chunks.ndim == 2 else None)


def told(act: Provenance, source: Mapping[str, Any] | None, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """`provenance` of a verdict: source and recipe too, which a manifest holds beside it."""
    known = None if source is None else {key: source.get(key) for key in _SOURCE}
    if known is not None and known["kind"] != "hub":  # older manifests hold a path
        known["spec"] = plain(name_of(str(known["spec"])))
    return {**act.model_dump(), "source": known, "recipe": recipe}
