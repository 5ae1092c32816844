"""What lies beside an export: README.md for people, `export.json` for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from ..checkpoint.hub import hub_id
from ..checkpoint.provenance import Provenance
from ..converted.origin import Origin
from ..words import count_of, number, visible_name, wrapped
from .base import Engine, Finished

EXPORT = "export.json"
FORMAT = 1

_CARD = """---
{metadata}
---

# {name}, for {title}

{what}

## Use

{usage}

## Shown

{shown}

## Made of

{made}

`{export}` holds the same for programs, with the SHA-256 of each file.
"""


@dataclass(frozen=True)
class Shown:
    """What was found: `proof` in one sentence, and what was measured on text, empty where nothing was."""

    proof: str
    measured: Mapping[str, Any]
    act: Provenance


def card(engine: Engine, finished: Finished, known: Origin, name: str, shown: Shown) -> str:
    """README.md of the export of `finished` into a directory called `name`. `known`: what its own card says."""
    repo = original_repo(finished)
    bases = (repo,) if repo is not None else known.base_model
    metadata = ModelCardData(
        license=known.license, license_name=known.license_name, license_link=known.license_link,
        library_name=engine.library, pipeline_tag="text-generation", tags=["surgery", "attention-bias"],
        base_model=list(bases) or None,
    )  # fmt: skip
    eab = finished.described.eab
    what = (
        f"`{visible_name(finished.name)}` for {engine.title}: {count_of(eab.n_slots, 'slot')} in each of "
        f"{count_of(len(eab.sites), 'attention site')}, the keys and values of the token ids {list(eab.prefix_ids)}. "
        "Do not put these tokens in front of the text: they are inside."
    )
    return _CARD.format(
        metadata=metadata.to_yaml().rstrip(), name=visible_name(finished.name), title=engine.title,
        what=wrapped(what), usage=engine.usage(finished, name).strip(),
        shown=_shown(engine, shown, finished.described.packed is not None),
        made="\n".join(_made(finished)), export=EXPORT,
    )  # fmt: skip


def _shown(engine: Engine, shown: Shown, rounded: bool) -> str:
    measured = shown.measured
    if not measured:
        return f"{wrapped(shown.proof)}\n\nNothing was measured on text (`--text`)."
    ppl, texts = measured["perplexity"], ", ".join(f"`{file.name}`" for file in shown.act.texts.evaluation)
    rows = [
        f"| | perplexity on {measured['chunks']} x {measured['chunk_length']} tokens |", "|---|---:|",
        f"| the converted checkpoint, in transformers | {number(ppl['converted']['ppl'], 9)} |",
        f"| this export, in {engine.title} | {number(ppl['exported']['ppl'], 9)} |",
    ]  # fmt: skip
    apart = (
        f"The largest |delta log-probability| of a token of the text is {measured['delta_log_probability']:.2g}, the "
        f"mean {measured['mean_delta_log_probability']:.2g}."
    )
    if rounded:
        apart += " Kernels add in another order, and then round another way: the mean is judged."
    return "\n\n".join((wrapped(shown.proof), "\n".join(rows), wrapped(f"{apart} Text: {texts}.")))


def _made(finished: Finished) -> Iterator[str]:
    source = finished.manifest.source
    yield f"* the converted checkpoint `{visible_name(finished.name)}`, whose `surgery.json` has the digest"
    yield f"  `{finished.digest}`"
    revision = f" at `{visible_name(str(source['revision']))}`" if source.get("revision") else ""
    yield f"* for the original `{visible_name(str(source.get('spec')))}`{revision}, whose files are"
    hashes = source.get("sha256")
    for name, digest in sorted(hashes.items()) if isinstance(hashes, dict) else ():
        yield f"  * `{visible_name(str(name))}`: `{visible_name(str(digest))}`"


def original_repo(finished: Finished) -> str | None:
    """The hub's "owner/name" of the original, where it comes from there."""
    source = finished.manifest.source
    found = hub_id(str(source.get("spec"))) if source.get("kind") == "hub" else None
    return None if found is None else found.repo


def export_json(
    engine: Engine, finished: Finished, shown: Shown, files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """The content of `export.json`."""
    source, eab = finished.manifest.source, finished.described.eab
    return {
        "format": FORMAT,
        "engine": engine.name,
        "converted": {"name": finished.name, "digest": finished.digest, "status": finished.manifest.status},
        "original": {key: source.get(key) for key in ("spec", "kind", "revision", "sha256")},
        "slots": {"count": eab.n_slots, "sites": len(eab.sites), "prefix_ids": list(eab.prefix_ids)},
        "proof": shown.proof,
        "measured": dict(shown.measured) or None,
        **engine.details(finished),
        "files": dict(files),
        "provenance": shown.act.model_dump(),
    }
