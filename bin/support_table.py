#!/usr/bin/env python3
"""Write which model families are supported, from the data that the tests hold surgery to (families.yaml).

    bin/support_table.py [--check]

The sum goes into README.md, tables into surgery/README.md. With --check nothing is written: exit 1 if one of them says
something else than the data.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from marked import ROOT, update
from ruamel.yaml import YAML

# The order in which a row of the table names them; tests/helpers/families.yaml may name no others.
TERMS = (
    "grouped", "multi-query", "latent", "window", "chunked", "mixed layers", "shared keys/values", "q/k norm",
    "clipped q/k/v", "softcap", "sink logits", "temperature by position", "per-head gate", "output gate",
    "parallel block", "shared attention", "logit scaling", "final softcap", "gated delta net", "delta attention",
    "lightning attention", "Mamba", "Mamba-2", "Mamba-2 beside attention", "short convolution",
    "indexer", "MoE", "multimodal",
)  # fmt: skip


def families() -> tuple[str, list[dict]]:
    """The version of transformers, and its model types with what is known of each: exact, refused, not a fit."""
    data = YAML(typ="safe").load((ROOT / "tests" / "helpers" / "families.yaml").read_text(encoding="utf-8"))
    rows = data["families"].items()
    outcomes = ("exact", "refused", "not a fit")
    return data["transformers"], [{kind: row for kind, row in rows if row["outcome"] == wanted} for wanted in outcomes]


def summary() -> str:
    version, (exact, refused, unfit) = families()
    return (
        f"Of the {len(exact) + len(refused) + len(unfit)} causal language model types in transformers {version}, "
        f"**{len(exact)} are exact**. {len(refused)} are refused with the reason. {len(unfit)} are not a fit: they "
        "have no causal softmax attention over their own tokens alone."
    )


def tables() -> str:
    _, (exact, refused, unfit) = families()
    return "\n".join(
        [
            summary(),
            "",
            *_folded(f"Exact ({len(exact)})", ["positions", "attention", "model types"], _by_kind(exact)),
            *_folded(f"Refused ({len(refused)})", ["reason", "model types"], _by_reason(refused)),
            *_folded(f"Not a fit ({len(unfit)})", ["reason", "model types"], _by_reason(unfit)),
        ]
    )


def _by_kind(rows: dict) -> list[list[str]]:
    grouped = defaultdict(list)
    for kind, row in rows.items():
        terms = sorted(row.get("attention", []), key=TERMS.index)
        grouped[row["positions"], ", ".join(terms) or "plain"].append(kind)
    return [[*key, ", ".join(kinds)] for key, kinds in sorted(grouped.items())]


def _by_reason(rows: dict) -> list[list[str]]:
    grouped = defaultdict(list)
    for kind, row in rows.items():
        grouped[row["why"]].append(kind)
    return [[why, ", ".join(kinds)] for why, kinds in sorted(grouped.items(), key=lambda item: -len(item[1]))]


def _folded(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


if __name__ == "__main__":
    parts = (("README.md", "families", summary()), ("surgery/README.md", "families", tables()))
    sys.exit(update("bin/support_table.py", parts, sys.argv[1:]))
