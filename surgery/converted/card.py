"""README.md of a converted checkpoint: its model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from ..checkpoint.source import Source
from ..plain import shown
from ..words import wrapped

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

{loading}

{limits}

## Measured

{results}

## Recipe

```json
{recipe}
```

`surgery.json` holds the source and its hashes, what became of each tensor, the SHA-256 of each file and the whole
verdict. `surgery verify PATH` checks them.
"""
_LOADING = """torch and transformers are all it needs. With `import surgery` first, `trust_remote_code` can be left out.
{inside} Loading by a class's own name (`{causal}.from_pretrained`) bypasses all of this, cannot be stopped, and gives
a model without its {added}."""
_LIMITS = (
    "The attention implementation is `sdpa` or `eager`; others are refused, since they would leave the {added} out."
)


@dataclass(frozen=True)
class Section:
    """What one operation says of itself on the card.

    `text` is a phrase that goes on after "with", where the operation adds something (`adds`, in a word; `title` and
    `tag` name it), otherwise a sentence. `loading` and `limits` are sentences under these headings.
    """

    text: str
    tag: str | None = None
    title: str | None = None
    adds: str | None = None
    loading: str = ""
    limits: str = ""


def model_card(
    source: Source, causal: str, recipe: dict[str, Any], sections: Sequence[Section], results: str | None
) -> str:
    """The card's text. `causal` is the original's class.

    `results` are what was measured, in Markdown; None: nothing was, and the card says so.
    """
    adding = [section for section in sections if section.adds is not None]
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation",
        tags=["surgery", *(section.tag for section in adding if section.tag is not None)],
        base_model=source.spec if source.kind == "hub" else None,
    )  # fmt: skip
    base = shown(source.spec if source.kind == "hub" else source.root.name)
    what = "\n\nIt also has ".join(wrapped(section.text) for section in adding)
    also = [wrapped(section.text) for section in sections if section.adds is None]
    added = " and ".join(section.adds for section in adding if section.adds is not None)
    inside, further = (
        " ".join(filter(None, (getattr(section, part) for section in sections))) for part in ("loading", "limits")
    )
    return _CARD.format(
        metadata=metadata.to_yaml(), title=f"{base}, with {' and '.join(section.title or '' for section in adding)}",
        base=base, what="\n\n".join([what, *also]),
        loading=wrapped(_LOADING.format(inside=inside, causal=causal, added=added)),
        limits=wrapped(f"{_LIMITS.format(added=added)} {further}"),
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False),
        results=results if results is not None else "Nothing: written with --no-verify.",
    )  # fmt: skip
