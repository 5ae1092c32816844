"""The verdict: prefix, what was measured, gates, integrity."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .tables import exp, new_table, ranges


def show_verdict(console: Console, verdict: dict) -> None:
    if prefix := verdict.get("prefix"):
        tokens = " ".join(repr(token) for token in prefix["tokens"] or ())
        console.print(f"Prefix {escape(tokens)} (ids {prefix['ids']}), folded into k', v'\n", markup=True)
    if verdict.get("tuning"):
        console.print(_tuning_table(verdict["tuning"]), "")
    if verdict.get("perplexity"):
        console.print(_perplexity_table(verdict), "")
    if verdict.get("massive_activations"):
        console.print(_massive_table(verdict["massive_activations"]), "")
    if verdict.get("quantised"):
        console.print(_quantised_table(verdict["quantised"]), "")
    if verdict.get("streaming"):
        console.print(_streaming_table(verdict["streaming"]), "")
    if verdict.get("cache_edits"):
        console.print(_edits_table(verdict["cache_edits"]), "")
    if verdict.get("tasks"):
        console.print(_tasks_table(verdict["tasks"]), "")
    if verdict["gates"]:
        gates = new_table("Gates", "", "value", "limit", "result")
        for gate in verdict["gates"]:
            gates.add_row(escape(gate["name"]), _number(gate["value"]), _number(gate["limit"]), _result(gate["passed"]))
        console.print(gates, "")
    checks = new_table("Integrity", "", "found", "result")
    checks.columns[1].justify = "left"
    for check in verdict["integrity"]["checks"]:
        checks.add_row(check["name"], escape(check["detail"]), _result(check["passed"]))
    console.print(checks)


def _result(passed: bool) -> str:
    return "[green]passed[/]" if passed else "[red]FAILED[/]"


def _number(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _tuning_table(found: dict) -> Table:
    table = new_table("Tuning", "", "step", "held-out perplexity", "of start")
    judged = found["held_out"]
    best = next(entry for entry in judged if entry["step"] == found["best_step"])
    for what, entry in {"start": judged[0], "last": judged[-1], "best, kept": best}.items():
        table.add_row(what, f"{entry['step']:,}", f"{entry['ppl']:.4f}", f"{exp(entry['nll'] - judged[0]['nll']):.4f}")
    if found["stopped"]:
        table.caption, table.caption_justify = f"stopped: {escape(found['stopped'])}", "left"
    return table


def _perplexity_table(verdict: dict) -> Table:
    table = new_table("Perplexity", "", "perplexity", "nats/token", "of bare", "95% interval, paired")
    labels = {
        "bare": "original, bare",
        "bos": "original + BOS",
        "control": "original + prefix",
        "converted": "converted",
    }
    interval = (verdict.get("delta_nll") or {}).get("vs_bare")
    bare = verdict["perplexity"].get("bare")
    for key, label in labels.items():
        if (score := verdict["perplexity"].get(key)) is None or (key == "control" and not verdict.get("prefix")):
            continue
        ratio = f"{exp(score['nll'] - bare['nll']):.4f}" if bare else ""
        shown = f"{exp(interval['low']):.4f} to {exp(interval['high']):.4f}" if interval and key == "converted" else ""
        table.add_row(label, f"{score['ppl']:.4f}", f"{score['nll']:.7f}", ratio, shown)
    table.caption = f"{verdict['perplexity']['converted']['tokens']:,} target tokens, float32"
    table.caption_justify = "left"
    return table


def _quantised_table(found: dict) -> Table:
    table = new_table("Quantised, simulated", "", "original", "of bare", "converted", "of bare", "95% interval, paired")
    rows = []
    for scheme, entry in found.items():
        rows.append((scheme, entry))
        if "executed" in entry:
            rows.append((f"{scheme}, executed", entry["executed"]))
    for scheme, entry in rows:
        original, converted = entry["delta_nll"]["original"], entry["delta_nll"]["converted"]
        table.add_row(
            scheme, f"{entry['original']['ppl']:,.4f}", f"{exp(original['mean']):.4f}",
            f"{entry['converted']['ppl']:,.4f}", f"{exp(converted['mean']):.4f}",
            f"{exp(converted['low']):.4f} to {exp(converted['high']):.4f}",
        )  # fmt: skip
    return table


def _streaming_table(found: dict) -> Table:
    table = new_table("Streaming through a window", "", "perplexity", "of original keeping", "95% interval, paired")
    kept = found["original_kept"]
    table.add_row(f"original, keeping {kept['tokens_kept']} tokens", f"{kept['ppl']:,.4f}", "1.0000", "")
    for name in ("original", "converted"):
        delta = found["delta_nll"][f"{name}_vs_kept"]
        interval = f"{exp(delta['low']):.4f} to {exp(delta['high']):.4f}"
        table.add_row(f"{name}, keeping none", f"{found[name]['ppl']:,.4f}", f"{exp(delta['mean']):.4f}", interval)
    return table


def _edits_table(found: dict) -> Table:
    columns = ("original", "keeping four", "converted")
    table = new_table("Behind an edited cache", "", *columns, "of keeping four", "95% interval, paired")
    whole = found["none"]
    table.add_row(
        "unedited, perplexity", f"{whole['original']['ppl']:,.4f}", "", f"{whole['converted']['ppl']:,.4f}", "", ""
    )
    for edit, entry in found.items():
        if edit == "none":
            continue
        delta = entry["delta_nll"]
        ratios = [f"{exp(delta[name]['mean']):.4f}" for name in ("original", "original_kept", "converted")]
        against = delta["converted_vs_kept"]
        interval = f"{exp(against['low']):.4f} to {exp(against['high']):.4f}"
        table.add_row(f"{edit.replace('_', ', ')}, of unedited", *ratios, f"{exp(against['mean']):.4f}", interval)
    return table


def _tasks_table(found: dict) -> Table:
    table = new_table("Zero-shot tasks", "", "documents", "original", "converted", "drop", "95% interval, paired")
    for task, metrics in found.items():
        for metric, entry in metrics.items():
            before, after = (f"{entry[name]:.4f} ± {entry[f'{name}_stderr']:.4f}" for name in ("original", "converted"))
            drop = entry["drop"]
            interval = f"{drop['low']:+.4f} to {drop['high']:+.4f}"
            table.add_row(
                escape(f"{task}, {metric}"), f"{entry['documents']:,}", before, after, f"{drop['mean']:+.4f}", interval
            )
    return table


def _massive_table(found: dict) -> Table:
    table = new_table("Massive activations", "", "count", "worst / median", "layers", "dims", "on tokens")
    for when in ("before", "after"):
        if (entry := found.get(when)) is None:
            continue
        tokens = escape(", ".join(repr(token) for token in entry.get("tokens", [])[:4])) or "-"
        dims = ", ".join(map(str, entry["dims"][:4])) or "-"
        worst = f"{entry['worst_ratio']:,.0f}" if entry["count"] else "-"
        table.add_row(when, f"{entry['count']:,}", worst, ranges(entry["layers"]), dims, tokens)
    return table
