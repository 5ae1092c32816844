"""README.md of a converted checkpoint: its model card."""

from __future__ import annotations

import json

from huggingface_hub import ModelCardData

from ..checkpoint.source import Source
from .derived import Derived

_CARD = """---
{metadata}
---

# {title}

`{base}` with an **explicit attention bias**: {n} constant key/value pair(s) k', v' in each of {sites} attention sites,
folded from the token prefix {tokens}. {exact}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

torch and transformers are all it needs. With `import surgery` first, `trust_remote_code` can be left out. Do not put
the prefix in front of the text: it is inside. Loading by a class's own name (`{causal}.from_pretrained`) bypasses all
of this, cannot be stopped, and gives a model without its slots.

The attention implementation is `sdpa` or `eager`; others are refused, since they would leave the slots out. Positions 0
to {last} belong to the prefix, so the longest text is {n} tokens shorter than the original's. {bos}

## Measured

{results}

## Recipe

```json
{recipe}
```

`surgery.json` holds the source and its hashes, what became of each tensor, the SHA-256 of each file and the whole
verdict. `surgery verify PATH` checks them.
"""

_EXACT = {
    "as_prefix": "In exact arithmetic the model computes what the original computes behind that prefix, and the tokens "
    "that carried massive activations are never computed.",
    "always": "Every query sees them, also where a layer's window would have hidden the prefix: there the model "
    "differs from the original on purpose.",
}


def model_card(
    source: Source,
    derived: Derived,
    recipe: dict,
    eab: dict,
    tokens: list[str] | None,
    folds_bos: bool,
    verdict: dict | None,
) -> str:
    """The card's text. `verdict` None: nothing was measured, and the card says so."""
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["surgery", "attention-bias"],
        base_model=source.spec if source.kind == "hub" else None,
    )  # fmt: skip
    n = eab["n_slots"]
    base = source.spec if source.kind == "hub" else source.root.name
    return _CARD.format(
        metadata=metadata.to_yaml(), title=f"{base}, with explicit attention bias", base=base, n=n,
        sites=len(eab["sites"]), last=n - 1, exact=_EXACT[eab["slots_visible"]],
        tokens=", ".join(f"`{json.dumps(token)}`" for token in tokens) if tokens else f"with ids {eab['prefix_ids']}",
        causal=derived.causal_class.removeprefix("Eab"), recipe=json.dumps(recipe, indent=2, ensure_ascii=False),
        bos="The BOS token is among the slots; the tokenizer no longer adds it." if folds_bos else "",
        results=_results(verdict) if verdict is not None else "Nothing: written with --no-verify.",
    )  # fmt: skip


def _results(verdict: dict) -> str:
    scores, massive = verdict["perplexity"], verdict["massive_activations"]
    labels = {
        "bare": "original, bare",
        "bos": "original + BOS",
        "control": "original + the same prefix",
        "converted": "converted",
    }
    rows = [f"| {labels[name]} | {score['ppl']:.4f} |" for name, score in scores.items() if score is not None]
    table = ["| variant | perplexity |", "|---|---|", *rows]
    low, high = verdict["delta_nll"]["vs_bare"]["low"], verdict["delta_nll"]["vs_bare"]["high"]
    before, after = massive["before"], massive["after"]
    return "\n".join(
        [
            f"{scores['converted']['tokens']:,} target tokens, float32.",
            "",
            *table,
            "",
            f"Converted minus bare, nats per token, paired 95% interval: {low:+.5f} to {high:+.5f}.",
            "Massive activations (|x| >= 100 and >= 1000 x median): "
            f"{before['count']:,} before, {after['count']:,} after.",
        ]
    )
