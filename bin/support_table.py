#!/usr/bin/env python3
"""Write the README's table of supported families from tests/families.yaml, the data that the tests hold surgery to.

    bin/support_table.py [--check]

With --check nothing is written: exit 1 if the README says something else than the data.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- families: written by bin/support_table.py -->", "<!-- end of families -->"


# The order in which a row of the table names them; tests/families.yaml may name no others.
TERMS = (
    "grouped", "multi-query", "latent", "window", "chunked", "mixed layers", "shared keys/values", "q/k norm",
    "clipped q/k/v", "softcap", "sink logits", "temperature by position", "per-head gate", "output gate",
    "parallel block", "logit scaling", "final softcap", "MoE", "multimodal",
)  # fmt: skip


def table() -> str:
    data = YAML(typ="safe").load((ROOT / "tests" / "families.yaml").read_text(encoding="utf-8"))
    rows = data["families"]
    by_outcome = {
        outcome: {kind: row for kind, row in rows.items() if row["outcome"] == outcome}
        for outcome in ("exact", "refused", "not a fit")
    }
    exact, refused, unfit = by_outcome.values()
    return "\n".join(
        [
            f"Of the {len(rows)} causal language model types in transformers {data['transformers']}, **{len(exact)} "
            f"are exact**, {len(refused)} are refused with the reason, and {len(unfit)} are not a fit: they have no "
            "causal softmax attention over their own tokens alone.",
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


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n{table()}{END}{after}"
    if arguments == ["--check"]:
        return int(text != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
