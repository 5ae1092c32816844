"""README.md of a converted checkpoint: its model card."""

from __future__ import annotations

import json
from dataclasses import dataclass

from huggingface_hub import ModelCardData

from ..checkpoint.source import Source
from ..recipe import Recipe
from .card_results import results, tuned
from .derived import Derived

_CARD = """---
{metadata}
---

# {title}

`{base}` with {what}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

torch and transformers are all it needs. With `import surgery` first, `trust_remote_code` can be left out. {inside}
Loading by a class's own name (`{causal}.from_pretrained`) bypasses all of this, cannot be stopped, and gives a model
without its {added}.

The attention implementation is `sdpa` or `eager`; others are refused, since they would leave the {added} out. {places}

## Measured

{results}

## Recipe

```json
{recipe}
```

`surgery.json` holds the source and its hashes, what became of each tensor, the SHA-256 of each file and the whole
verdict. `surgery verify PATH` checks them.
"""

_SLOTS = """an **explicit attention bias**: {n} constant key/value pair(s) k', v' in each of {sites} attention sites,
folded from the token prefix {tokens}. {exact}"""
_PLACES = """Positions 0
to {last} belong to the prefix, so the longest text is {n} tokens shorter than the original's. {bos}"""
_NORMS = """a **head-wise RMSNorm** in {sites} of {attending} attention sites: what each head brings back is normed
before the output projection, with weights that {share}. {gate}"""
_SMOOTHED = """Smoothing has scaled {n:,} tensors by powers of two, the same function: what was large in activations is
in the weights that read them."""
_EXACT = {
    "as_prefix": "In exact arithmetic the model computes what the original computes behind that prefix, and the tokens "
    "that carried massive activations are never computed.",
    "always": "Every query sees them, also where a layer's window would have hidden the prefix: there the model "
    "differs from the original on purpose.",
}
_EXACT_ALONE = "Without what follows, the model would compute what the original computes behind that prefix."


@dataclass(frozen=True)
class Reworked:
    """What became of the source's own tensors: how many smoothing scaled and LoRA was merged into; how tuning went."""

    smoothed: int
    merged: int
    tuning: dict | None


def model_card(
    source: Source,
    derived: Derived,
    recipe: Recipe,
    entries: dict[str, dict],
    tokens: list[str] | None,
    folds_bos: bool,
    reworked: Reworked,
    verdict: dict | None,
) -> str:
    """The card's text. `entries` are what config.json says of the operations.

    `verdict` None: nothing was measured, and the card says so.
    """
    slots, norms = entries["eab"]["n_slots"] > 0, "head_norm" in entries
    parts = [(slots, "attention-bias", "explicit attention bias", "slots"),
             (norms, "head-norm", "head-wise RMSNorm", "norms")]  # fmt: skip
    tags, titles, added = zip(*(words for there, *words in parts if there), strict=True)
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["surgery", *tags],
        base_model=source.spec if source.kind == "hub" else None,
    )  # fmt: skip
    base = source.spec if source.kind == "hub" else source.root.name
    what = [_slots(entries["eab"], tokens, recipe.exact)] if slots else []
    what += [_norms(entries, recipe)] if norms else []
    also = [_SMOOTHED.format(n=reworked.smoothed)] if recipe.smoothing is not None else []
    if recipe.tune is not None:
        also.append(tuned(recipe.tune, slots, norms, reworked.merged, reworked.tuning))
    return _CARD.format(
        metadata=metadata.to_yaml(), title=f"{base}, with {' and '.join(titles)}", base=base,
        what="\n\n".join(["\n\nIt also has ".join(what), *also]), added=" and ".join(added),
        inside="Do not put\nthe prefix in front of the text: it is inside." if slots else "",
        places=_places(entries["eab"], folds_bos) if slots else "",
        causal=derived.causal_class.removeprefix("EabNorm" if norms else "Eab"),
        recipe=json.dumps(recipe.to_dict(), indent=2, ensure_ascii=False),
        results=results(verdict, recipe.verify) if verdict is not None else "Nothing: written with --no-verify.",
    )  # fmt: skip


def _slots(eab: dict, tokens: list[str] | None, exact: bool) -> str:
    named = ", ".join(f"`{json.dumps(token)}`" for token in tokens) if tokens else f"with ids {eab['prefix_ids']}"
    visible = eab["slots_visible"]
    said = _EXACT[visible] if exact or visible == "always" else _EXACT_ALONE
    return _SLOTS.format(n=eab["n_slots"], sites=len(eab["sites"]), tokens=named, exact=said)


def _places(eab: dict, folds_bos: bool) -> str:
    bos = "The BOS token is among the slots; the tokenizer no longer adds it." if folds_bos else ""
    return _PLACES.format(last=eab["n_slots"] - 1, n=eab["n_slots"], bos=bos)


def _norms(entries: dict[str, dict], recipe: Recipe) -> str:
    described, attending = entries["head_norm"], entries["eab"]["sites"]
    if recipe.tune is None and recipe.head_norm.gate == 0:
        gate = "Its gates are 0: the model computes what it would without the norms, exactly, until they are trained."
    elif described["gated"]:
        gate = "A gate for each head mixes it in: o + g (norm(o) - o)."
    else:
        gate = "It has no gate."
    share = "are each head's own" if described["per_head"] else "the heads of a site share"
    return _NORMS.format(sites=len(described["sites"]), attending=len(attending), share=share, gate=gate)
