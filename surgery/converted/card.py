"""README.md of a converted checkpoint: its model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..anatomy.classes import CAUSAL, auto_of
from ..anatomy.sites import Anatomy
from ..checkpoint.provenance import Provenance
from ..checkpoint.source import Source
from ..words import listing, visible_name, wrapped
from .origin import Origin

_CARD = """---
{metadata}
---

# {title}

{what}

## Load

```python
from transformers import {reader}, {auto}

model = {auto}.from_pretrained("PATH", trust_remote_code=True)
{reads} = {reader}.from_pretrained("PATH", trust_remote_code=False)  # it needs no code
```

{loading}

## Limits

{limits}

## Measured

{results}

## Licence

{licence}

## How it was made

{made}

### Recipe

```json
{recipe}
```

`surgery.json` holds the source and its hashes, what became of each tensor, the SHA-256 of each file and the whole
verdict. `surgery verify PATH` checks them.
"""
_LOADING = """{needed} are all it needs. With `import surgery` first, `trust_remote_code` can be left out.
{inside}"""
_LIMITS = (
    "* The attention implementation is `sdpa` or `eager`; others are refused, since they would leave the {added} out.",
    "* A class loaded by its own name (`{kind}.from_pretrained`) bypasses all of this, cannot be stopped, and gives "
    "a model without its {added}.",
)
_PACKED = (
    "The weights are the source's, byte for byte: {words}. Slots were computed as transformers runs it on a CPU, "
    "{rounded}. Kernels that round otherwise leave them as near as they leave the source's own keys and values."
)
_ROUNDED = {True: "with values rounded between layers as the format says", False: "with the weights unpacked"}
_AS_PLAIN = " transformers reads this format with `quantization_config=CompressedTensorsConfig(dequantize=True)` alone."
_READS = {
    "text": {"reader": "AutoTokenizer", "reads": "tokenizer"},
    "images": {"reader": "AutoImageProcessor", "reads": "processor"},
    "audio": {"reader": "AutoFeatureExtractor", "reads": "extractor"},
}
_TASKS = {  # of Auto classes, as the hub calls them
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
_UNPROVED = "Nothing: written with --no-verify."


@dataclass(frozen=True)
class Section:
    """What one operation says of itself on the card.

    `text` is a phrase that goes on after "with", where the operation adds something (`adds`, in a word; `title` and
    `tag` name it), otherwise a sentence. `loading` and `limits` are sentences under these headings.
    `needs`: packages without which it does not load.
    """

    text: str
    tag: str | None = None
    title: str | None = None
    adds: str | None = None
    loading: str = ""
    limits: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """What was found and how, in Markdown; and the verdict's JSON, None where nothing was measured."""

    name: str  # of the converted checkpoint
    verdict: Mapping[str, Any] | None
    results: str
    act: Provenance
    made: str


def model_card(
    source: Source, known: Origin, anatomy: Anatomy, recipe: dict[str, Any], sections: Sequence[Section], shown: Shown
) -> str:
    """The card's text. `anatomy` is the original's; `known` is what the source's own card says."""
    adding = [section for section in sections if section.adds is not None]
    added = " and ".join(section.adds for section in adding if section.adds is not None)
    metadata = _metadata(known, anatomy, [section.tag for section in adding if section.tag is not None], shown)
    base = _base(source, known)
    starts = [f"{base} with ", *["It also has "] * len(adding)]
    what = [wrapped(start + section.text) for start, section in zip(starts, adding, strict=False)]
    what = what or [f"It was made of {base}."]
    what += [wrapped(section.text) for section in sections if section.adds is None]
    inside = " ".join(section.loading for section in sections if section.loading)
    limits = [line.format(added=added, kind=anatomy.model_class.__name__) for line in _LIMITS]
    packed = source.quantised
    if packed is not None:
        limits.append(f"* {_PACKED.format(words=packed.words, rounded=_ROUNDED[packed.rounds_activations])}")
    inside += _AS_PLAIN if packed is not None and packed.as_plain else ""
    needs = [*(() if packed is None else packed.needs), *(name for section in sections for name in section.needs)]
    needed = listing(["torch", "transformers", *needs])
    limits += [f"* {section.limits}" for section in sections if section.limits]
    title = _title(source, known)
    if adding:
        title += f", with {' and '.join(section.title or '' for section in adding)}"
    return _CARD.format(
        metadata=metadata.to_yaml().rstrip(), title=title, what="\n\n".join(what),
        loading=wrapped(_LOADING.format(needed=needed, inside=inside)), results=shown.results or _UNPROVED,
        limits="\n".join(wrapped(line).replace("\n", "\n  ") for line in limits),
        licence=wrapped(_licence(known)), made=shown.made,
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False), auto=_auto(anatomy),
        **_READS[anatomy.reads],
    )  # fmt: skip


def _auto(anatomy: Anatomy) -> str:
    return CAUSAL if anatomy.patching is None else auto_of(anatomy.model_class, anatomy.config_class)


def _task(anatomy: Anatomy) -> str:
    """What the hub calls what the model is for."""
    if anatomy.patching is None:
        return "text-generation"
    otherwise = "image-feature-extraction" if anatomy.reads == "images" else "feature-extraction"
    return _TASKS.get(_auto(anatomy), otherwise)


def _metadata(known: Origin, anatomy: Anatomy, tags: Sequence[str], shown: Shown) -> ModelCardData:
    """What the hub reads. It derives lineage from `base_model`; of its relations, "finetune" alone fits new weights."""
    results = [] if shown.verdict is None else _evaluated(shown.verdict, shown.act)
    return ModelCardData(
        language=_one_or_list(known.language), license=known.license, license_name=known.license_name,
        license_link=known.license_link, library_name="transformers", pipeline_tag=_task(anatomy),
        tags=["surgery", *tags], base_model=_one_or_list(known.base_model),
        model_name=shown.name if results else None, eval_results=results or None,
        base_model_relation="finetune" if known.base_model else None,
    )  # fmt: skip


def _evaluated(verdict: Mapping[str, Any], act: Provenance) -> list[EvalResult]:
    """Perplexity after and before, as whoever converted the model has measured it."""
    files, cut, scores = act.texts.evaluation, act.chunks.evaluation, verdict.get("perplexity") or {}
    if not files or cut is None or cut.length is None:
        return []
    named = {"converted": "perplexity", "bare": "perplexity of the original"}
    found = {name: float((scores.get(key) or {}).get("ppl", math.nan)) for key, name in named.items()}
    arguments = {"sha256": [file.sha256 for file in files], "chunks": cut.count, "tokens in a chunk": cut.length}
    if act.texts.split:
        arguments["part"] = "second half"
    return [
        EvalResult(
            task_type="text-generation", dataset_type="text", dataset_name=", ".join(file.name for file in files),
            dataset_args=arguments, metric_type="perplexity", metric_name=name, metric_value=round(value, 4),
            verified=False,
        )
        for name, value in found.items()
        if math.isfinite(value)
    ]  # fmt: skip


def _one_or_list(values: tuple[str, ...]) -> str | list[str] | None:
    return (list(values) if len(values) > 1 else values[0]) if values else None


def _title(source: Source, known: Origin) -> str:
    return known.base_model[0] if known.cached else visible_name(source.name)


def _base(source: Source, known: Origin) -> str:
    """The source as it may be named, with a link where the hub has it."""
    links = [f"[{name}](https://huggingface.co/{name})" for name in known.base_model]
    if links and (source.kind == "hub" or known.cached):
        return links[0]
    kind = {"gguf": "GGUF file", "directory": "local directory"}[source.kind]
    made_of = f", made of {listing(links)}" if links else ""
    return f"`{visible_name(source.name)}` (a {kind}{made_of})"


def _licence(known: Origin) -> str:
    """What the source's terms are, so far as it says; they hold for what was made of it."""
    name = f"{known.license} ({known.license_name})" if known.license_name else known.license
    link = known.license_link or ""
    where = f", see [{link}]({link})" if link else ""
    said = f"That of the source: {name}{where}." if name else "The source does not say, and its terms hold here too."
    if known.files:
        said += f" Its terms came along: {listing([f'[{file}]({file})' for file in known.files])}."
    return f"{said} Not read: {known.broken}." if known.broken else said
