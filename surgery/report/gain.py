"""A verdict's tables in the report, each with a text for readers new to it. Only what was measured is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .gain_words import EDITS, factor, gate_name, kept_state, schemes, shown, times
from .tables import Table
from .words import number, score, signed, visible_name

PASSED, FAILED = "✓ passed", "✗ failed"


@dataclass(frozen=True)
class Part:
    """One table of a verdict under a heading; `table` gives None where there is nothing to show."""

    key: str
    title: str
    text: str
    table: Callable[[dict], Table | None]


def perplexity(verdict: dict) -> Table | None:
    scores = verdict.get("perplexity") or {}
    if not scores.get("converted"):
        return None
    labels = {"bare": "original, bare", "bos": "original + BOS", "control": "original + the same prefix"}
    if not verdict.get("prefix"):
        del labels["control"]  # which is the bare original
    bare, deltas = scores.get("bare"), verdict.get("delta_nll") or {}
    rows = []
    for name, label in {**labels, "converted": "converted"}.items():
        if entry := scores.get(name):
            ratio = f"{factor(entry['nll'] - bare['nll']):.3f}" if bare else "–"
            rows.append(
                (label, score(entry["ppl"]), times(deltas["vs_bare"]) if name == "converted" and deltas else ratio)
            )
    note = f"{scores['converted']['tokens']:,} target tokens, float32."
    if verdict.get("prefix") and deltas.get("vs_control"):
        note += f" Over the original with the same prefix: {times(deltas['vs_control'])}."
    return Table(("", "perplexity", "times the bare original"), rows, note)


def quantised(verdict: dict) -> Table | None:
    rows = []
    for name, entry in schemes(verdict):
        before, after = entry["delta_nll"]["original"], entry["delta_nll"]["converted"]
        original, converted = (score(entry[which]["ppl"]) for which in ("original", "converted"))
        rows.append((name, original, "1" if before is None else times(before), converted, times(after)))
    head = ("", "original", "times the bare original", "converted", "times the bare original")
    return Table(head, rows, "In brackets the 95% interval, paired by chunk of text.") if rows else None


def streaming(verdict: dict) -> Table | None:
    found = verdict.get("streaming")
    if not found:
        return None
    kept, deltas = found["original_kept"], found["delta_nll"]
    rows = [(f"original, keeping its first {kept['tokens_kept']}", score(kept["ppl"]), "1")]
    for name in ("original", "converted"):
        rows.append((f"{name}, keeping none", score(found[name]["ppl"]), times(deltas[f"{name}_vs_kept"])))
    return Table(("", "perplexity", f"times that of keeping {kept['tokens_kept']}"), rows)


def cache_edits(verdict: dict) -> Table | None:
    found = verdict.get("cache_edits")
    if not found:
        return None
    whole, rows = found["none"], []
    rows.append(("unedited: perplexity", score(whole["original"]["ppl"]), "–", score(whole["converted"]["ppl"]), "–"))
    for edit, entry in found.items():
        if edit != "none":
            deltas = entry["delta_nll"]
            own = [f"× {number(factor(deltas[name]['mean']))}" for name in ("original", "original_kept", "converted")]
            rows.append((EDITS.get(edit, visible_name(edit)), *own, times(deltas["converted_vs_kept"])))
    return Table(("", "original", "keeping", "converted", "over keeping"), rows)


def tasks(verdict: dict) -> Table | None:
    rows = []
    for task, metrics in (verdict.get("tasks") or {}).items():
        for metric, entry in metrics.items():
            shares = [f"{entry[name]:.3f} ± {entry[f'{name}_stderr']:.3f}" for name in ("original", "converted")]
            low, high = (signed(entry["drop"][end]) for end in ("low", "high"))
            drop = f"{signed(entry['drop']['mean'])} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"
            rows.append((visible_name(f"{task}, {metric}"), number(entry["documents"]), *shares, drop))
    return Table(("", "documents", "original", "converted", "drop"), rows, "± is a standard error.") if rows else None


def tuning(verdict: dict) -> Table | None:
    found = verdict.get("tuning")
    if not found:
        return None
    start, best, last = found["held_out"][0], kept_state(found), found["held_out"][-1]
    rows = [
        (what, f"{entry['step']:,}", score(entry["ppl"]), f"{factor(entry['nll'] - start['nll']):.3f}")
        for what, entry in (("start", start), ("kept", best), ("last", last))
    ]
    stopped = f"Stopped: {visible_name(found['stopped']).rstrip('.')}." if found.get("stopped") else ""
    return Table(("", "step", "held-out perplexity", "times the start"), rows, stopped)


def gates(verdict: dict) -> Table | None:
    rows = [(gate_name(g["name"]), shown(g["value"]), shown(g["limit"]), PASSED if g["passed"] else FAILED)
            for g in verdict.get("gates") or []]  # fmt: skip
    if checks := (verdict.get("integrity") or {}).get("checks"):
        good = sum(check["passed"] for check in checks)
        rows.append(("checks of the files that hold", f"{good}", f"all {len(checks)}",
                     PASSED if good == len(checks) else FAILED))  # fmt: skip
    return Table(("", "found", "at most", "result"), rows) if rows else None


PARTS = (
    Part(
        "perplexity", "Perplexity",
        "How surprised a model is by text that it was not made with; lower is better. BOS is the token that texts "
        "begin with; behind it, or behind the prefix, the original has a place for its attention sinks too.",
        perplexity,
    ),
    Part(
        "quantised", "Quantised",
        "With numbers stored in few bits, as small and fast hardware wants them: weights and activations, or weights "
        "only, or the key/value cache only. A static scale is set once, on other text, and one huge activation makes "
        "it too coarse for all the others; a scale per token costs more to run.", quantised,
    ),
    Part(
        "streaming", "Streaming",
        "The model sees a window of the last tokens only, as in a text without end. An original that has its attention "
        "sinks on the first tokens suffers when they drop out, unless they are kept; slots never drop out.", streaming,
    ),
    Part(
        "edits", "Edited caches",
        "Tokens of the text are deleted from the key/value cache, or inserted, while the rest of it stays as it is; "
        "then perplexity of the text behind. × is over the same model's, unedited. Keeping is the original that keeps "
        "its first tokens, and over keeping the converted model's perplexity over its.", cache_edits,
    ),
    Part(
        "tasks", "Zero-shot tasks",
        "Questions without examples. Drop is what the converted model scores less, with its 95% interval, paired by "
        "document.", tasks,
    ),
    Part(
        "gates", "Gates",
        "What the recipe asks for. Of whatever has an interval, its far end must hold.", gates,
    ),
    Part(
        "tuning", "Tuning",
        "What was added was trained. Loss is what training lowers, at each step on other text; perplexity on text that "
        "is never trained on decides which state is kept. It is that of the quantised model where the recipe tunes for "
        "one.", tuning,
    ),
)  # fmt: skip
