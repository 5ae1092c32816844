"""What a model card says of a verdict: short tables, and tuning in a sentence."""

from __future__ import annotations

import textwrap

from ..live.likelihood import perplexity
from ..recipe import Tune, Verify

WIDTH = 112  # of the card's lines


def results(verdict: dict, gates: Verify) -> str:
    """Everything that `gates` had measured of original and converted model, as Markdown."""
    parts = [_perplexity(verdict), _quantised(verdict)]
    if gates.streaming is not None:
        parts.append(_streaming(verdict["streaming"], gates.streaming.window))
    if gates.cache_edits is not None:
        parts.append(_edits(verdict["cache_edits"], gates.cache_edits.tokens))
    parts.append(_tasks(verdict))
    return "\n\n".join(part for part in parts if part)


def tuned(settings: Tune, slots: bool, norms: bool, merged: int, found: dict | None) -> str:
    """One sentence: what was trained for how long, and what it did to perplexity on held-out text.

    `merged`: how many tensors LoRA was merged into; `found`: `tuning` of the verdict.
    """
    trained = ["the slots"] * slots + ["the norms of the heads"] * norms
    if settings.lora is not None:
        trained.append(f"LoRA of rank {settings.lora.rank} on {merged:,} linear layers")
    said = f"Tuning has trained {_joined(trained)}"
    if found is None:
        return _wrapped(f"{said}.")
    judged, steps = found["held_out"], max((entry["step"] for entry in found["losses"]), default=0)
    best = next(entry for entry in judged if entry["step"] == found["best_step"])
    if best["step"] == 0:
        return _wrapped(f"{said} for {steps:,} steps. None was better on held-out text than the start, which was kept.")
    merge = f", and LoRA is merged into {merged:,} tensors" if settings.lora is not None else ""
    form = f", quantised ({settings.quantised})," if settings.quantised is not None else ""
    return _wrapped(
        f"{said} for {steps:,} steps. Kept is the state after step {best['step']:,}{merge}; perplexity on held-out text"
        f"{form} went from {judged[0]['ppl']:.4f} to {best['ppl']:.4f}."
    )


def _perplexity(verdict: dict) -> str:
    scores, massive = verdict["perplexity"], verdict["massive_activations"]
    labels = {
        "bare": "original, bare",
        "bos": "original + BOS",
        "control": "original + the same prefix",
        "converted": "converted",
    }
    if "prefix" not in verdict:
        del labels["control"]  # which is the bare original
    rows = [
        f"| {labels[name]} | {score['ppl']:.4f} |"
        for name, score in scores.items()
        if score is not None and name in labels
    ]
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


def _quantised(verdict: dict) -> str | None:
    if not (found := verdict.get("quantised")):
        return None
    rows = []
    for name, entry in found.items():
        rows.append((name, entry))
        if "executed" in entry:
            rows.append((f"{name}, run in int8", entry["executed"]))
    lines = [
        f"| {name} | {entry['original']['ppl']:,.4f} | {_times(entry['delta_nll']['original'])} "
        f"| {entry['converted']['ppl']:,.4f} | {_times(entry['delta_nll']['converted'])} |"
        for name, entry in rows
    ]
    said = (
        "Quantised, simulated unless it says run; with perplexity over that of the bare original and its 95% interval:"
    )
    head = ["| scheme | original | of bare | converted | of bare |", "|---|---|---|---|---|"]
    return "\n".join([_wrapped(said), "", *head, *lines])


def _streaming(found: dict, window: int) -> str:
    kept, deltas = found["original_kept"], found["delta_nll"]
    lines = [f"| original, keeping its first {kept['tokens_kept']} tokens | {kept['ppl']:,.4f} | 1 |"]
    for name in ("original", "converted"):
        lines.append(f"| {name}, keeping none | {found[name]['ppl']:,.4f} | {_times(deltas[f'{name}_vs_kept'])} |")
    head = [f"| variant | perplexity | of keeping {kept['tokens_kept']} |", "|---|---|---|"]
    return "\n".join([f"Streaming through a window of the last {window:,} tokens:", "", *head, *lines])


def _edits(found: dict, tokens: int) -> str:
    lines = [
        f"| {edit.replace('_', ', ')} | {_times(entry['delta_nll']['converted_vs_kept'])} |"
        for edit, entry in found.items()
        if edit != "none"
    ]
    said = f"Perplexity behind a cache with {tokens:,} tokens edited, over that of the original that keeps its first:"
    return "\n".join([said, "", "| edit | converted |", "|---|---|", *lines])


def _tasks(verdict: dict) -> str | None:
    lines = [
        f"| {task}, {metric} | {entry['original']:.4f} | {entry['converted']:.4f} "
        f"| {entry['drop']['mean']:+.4f} ({entry['drop']['low']:+.4f} to {entry['drop']['high']:+.4f}) |"
        for task, metrics in (verdict.get("tasks") or {}).items()
        for metric, entry in metrics.items()
    ]
    head = ["| task | original | converted | drop |", "|---|---|---|---|"]
    return "\n".join(["Zero-shot tasks:", "", *head, *lines]) if lines else None


def _times(delta: dict) -> str:
    mean, low, high = (perplexity(delta[key]) for key in ("mean", "low", "high"))
    return f"{mean:.4f} ({low:.4f} to {high:.4f})"


def _joined(things: list[str]) -> str:
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
