"""Progress and tables on the terminal, by rich. Long work reports through one object, which callers can leave out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .checkpoint.disk import human

LOG_SECONDS = 30


class Reporter:
    """Silent: what the Python verbs use unless told otherwise."""

    def step(self, text: str) -> None:
        """A step has begun."""

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None) -> Iterator:
        """A progress bar (`total` None: of unknown length); yields `advance(count, what)`."""
        yield lambda count, what: None

    def note(self, text: str) -> None:
        """Something a person should know."""


class TerminalReporter(Reporter):
    """Steps, bars and notes on standard error, so that standard output holds only results."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def step(self, text: str) -> None:
        self._line(f"[bold]•[/] {escape(text)}")

    def note(self, text: str) -> None:
        self._line(f"  [yellow]note[/] {escape(text)}")

    def _line(self, text: str) -> None:
        # A log has no width: only a terminal breaks lines.
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None) -> Iterator:
        if not self.console.is_terminal:
            yield self._log_lines(total)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count, what: progress.update(task, advance=count, description=escape(what))

    def _log_lines(self, total: int | None):
        """For logs, which cannot redraw a bar: a line every half minute."""
        done, start, told = 0, time.monotonic(), time.monotonic()

        def advance(count: int, what: str) -> None:
            nonlocal done, told
            done += count
            if time.monotonic() - told >= LOG_SECONDS:
                told = time.monotonic()
                of = f" of {total:,}" if total is not None else ""
                self._line(f"  {escape(what)}: {done:,}{of} after {told - start:.0f} s")

        return advance


# ---- tables


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def show_plan(console: Console, plan: dict) -> None:
    kind, slots = plan["model_type"], plan["n_slots"]
    count = f"up to {slots['max']}" if isinstance(slots, dict) else str(slots)
    console.print(f"[bold]{escape(plan['source']['spec'])}[/]")
    console.print(f"{kind['from']} to {kind['to']}, {count} slots in each of {plan['sites']} attention sites\n")
    files = _table("Files", "name", "action", "bytes")
    for file in plan["files"]:
        files.add_row(escape(file["name"]), file["action"], "" if file["bytes"] is None else f"{file['bytes']:,}")
    console.print(files)
    console.print()
    statuses = _table("Tensors", "status", "count", "example", "dtype", "shape")
    for status in ("added", "changed", "kept"):
        named = [(name, entry) for name, entry in plan["tensors"].items() if entry["status"] == status]
        if named:
            name, entry = named[0]
            statuses.add_row(status, f"{len(named):,}", name, entry["dtype"], " x ".join(map(str, entry["shape"])))
    console.print(statuses)
    disk = plan["disk"]
    console.print(
        f"\nDisk: {human(disk['needed'])} needed, {human(disk['free'])} free. All tensors by name: --json FILE"
    )


def show_verdict(console: Console, verdict: dict) -> None:
    if prefix := verdict.get("prefix"):
        tokens = " ".join(repr(token) for token in prefix["tokens"] or ())
        console.print(f"Prefix {escape(tokens)} (ids {prefix['ids']}), folded into k', v'\n", markup=True)
    if verdict.get("perplexity"):
        console.print(_perplexity_table(verdict), "")
    if verdict.get("massive_activations"):
        console.print(_massive_table(verdict["massive_activations"]), "")
    if verdict.get("quantised"):
        console.print(_quantised_table(verdict["quantised"]), "")
    if verdict.get("streaming"):
        console.print(_streaming_table(verdict["streaming"]), "")
    if verdict["gates"]:
        gates = _table("Gates", "", "value", "limit", "result")
        for gate in verdict["gates"]:
            gates.add_row(gate["name"], _number(gate["value"]), _number(gate["limit"]), _result(gate["passed"]))
        console.print(gates, "")
    checks = _table("Integrity", "", "found", "result")
    checks.columns[1].justify = "left"
    for check in verdict["integrity"]["checks"]:
        checks.add_row(check["name"], escape(check["detail"]), _result(check["passed"]))
    console.print(checks)


def _result(passed: bool) -> str:
    return "[green]passed[/]" if passed else "[red]FAILED[/]"


def _perplexity_table(verdict: dict) -> Table:
    table = _table("Perplexity", "", "perplexity", "nats/token", "of bare", "95% interval, paired")
    labels = {
        "bare": "original, bare",
        "bos": "original + BOS",
        "control": "original + prefix",
        "converted": "converted",
    }
    interval = (verdict.get("delta_nll") or {}).get("vs_bare")
    bare = verdict["perplexity"].get("bare")
    for key, label in labels.items():
        if (score := verdict["perplexity"].get(key)) is None:
            continue
        ratio = f"{math.exp(score['nll'] - bare['nll']):.4f}" if bare else ""
        shown = (
            f"{_exp(interval['low']):.4f} to {_exp(interval['high']):.4f}" if interval and key == "converted" else ""
        )
        table.add_row(label, f"{score['ppl']:.4f}", f"{score['nll']:.7f}", ratio, shown)
    table.caption = f"{verdict['perplexity']['converted']['tokens']:,} target tokens, float32"
    table.caption_justify = "left"
    return table


def _quantised_table(found: dict) -> Table:
    table = _table("Quantised, simulated", "", "original", "of bare", "converted", "of bare", "95% interval, paired")
    for scheme, entry in found.items():
        original, converted = entry["delta_nll"]["original"], entry["delta_nll"]["converted"]
        table.add_row(
            scheme, f"{entry['original']['ppl']:,.4f}", f"{_exp(original['mean']):.4f}",
            f"{entry['converted']['ppl']:,.4f}", f"{_exp(converted['mean']):.4f}",
            f"{_exp(converted['low']):.4f} to {_exp(converted['high']):.4f}",
        )  # fmt: skip
    return table


def _streaming_table(found: dict) -> Table:
    table = _table("Streaming through a window", "", "perplexity", "of original keeping", "95% interval, paired")
    kept = found["original_kept"]
    table.add_row(f"original, keeping {kept['tokens_kept']} tokens", f"{kept['ppl']:,.4f}", "1.0000", "")
    for name in ("original", "converted"):
        delta = found["delta_nll"][f"{name}_vs_kept"]
        interval = f"{_exp(delta['low']):.4f} to {_exp(delta['high']):.4f}"
        table.add_row(f"{name}, keeping none", f"{found[name]['ppl']:,.4f}", f"{_exp(delta['mean']):.4f}", interval)
    return table


def _massive_table(found: dict) -> Table:
    table = _table("Massive activations", "", "count", "worst / median", "layers", "dims", "on tokens")
    for when in ("before", "after"):
        if (entry := found.get(when)) is None:
            continue
        tokens = escape(", ".join(repr(token) for token in entry.get("tokens", [])[:4])) or "-"
        dims = ", ".join(map(str, entry["dims"][:4])) or "-"
        worst = f"{entry['worst_ratio']:,.0f}" if entry["count"] else "-"
        table.add_row(when, f"{entry['count']:,}", worst, _ranges(entry["layers"]), dims, tokens)
    return table


def show_survey(console: Console, survey: dict) -> None:
    title = f"Survey of {escape(survey['source'])}"
    table = _table(
        title, "layer", "max", "median", "ratio", "massive", "dims", "|x_0|", "|x_i|", "p1", "entropy, bits",
        "sink rate", "mixing",
    )  # fmt: skip
    for row in survey["layers"]:
        dims = ", ".join(str(dim) for dim, _ in row["dims"][:4]) or "-"
        table.add_row(
            str(row["layer"]), f"{row['max']:,.1f}", f"{row['median']:.3f}", f"{row['ratio']:,.0f}", str(row["count"]),
            dims, f"{row['first_norm']:,.1f}", f"{row['rest_norm']:,.1f}", _share(row.get("p1")),
            _share(row.get("entropy_bits")), _share(row.get("sink_rate")), _share(row.get("mixing")),
        )  # fmt: skip
    console.print(table)
    for line in _findings(survey):
        console.print(line, markup=False, highlight=False)
    if survey.get("interventions"):
        console.print("")
        console.print(_interventions(survey["interventions"]))
        console.print(f"\n{_audit(survey['audit'])}", highlight=False)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _findings(survey: dict) -> list[str]:
    """What the table comes to, line by line."""
    total, across = survey["massive_activations"], survey["across"]
    lines = [
        "",
        f"{total['count']:,} massive activations in {survey['chunks']} x {survey['chunk_length']} tokens; "
        f"perplexity {survey['perplexity']['ppl']:.4f}",
    ]
    if total["count"]:
        tokens = " ".join(repr(token) for token in across["tokens"][:4])
        end = "last to the end" if across["died"] is None else f"gone from layer {across['died']} on"
        lines.append(
            f"Born in layer {across['born']}, {end}; dims {', '.join(map(str, total['dims'][:6]))}, on {tokens}"
        )
    if looked := max((row.get("spectra") or 0 for row in survey["layers"]), default=0):
        lines.append(f"p1, entropy and phases are those of {looked} of the {survey['chunks']} sequences")
    for unit in survey["super_neurons"][:3]:
        lines.append(
            f"Super neuron: layer {unit['layer']}, unit {unit['unit']}, {unit['share']:.0%} of what is written to dim "
            f"{unit['dim']}"
        )
    if phases := across["phases"]:
        named = ", ".join(f"{name} {span[0]}-{span[1]}" for name, span in phases.items() if span)
        lines.append(f"Phases by layer: {named}")
    return lines


def _interventions(rows: list[dict]) -> Table:
    table = _table(
        "Interventions", "", "where", "touched", "perplexity", "of untouched", "95% interval", "sink rate",
        "entropy, bits", "massive",
    )  # fmt: skip
    for row in rows:
        where = escape(str(row["where"]))
        if row.get("error"):
            table.add_row(row["name"], where, "0", escape(row["error"]))
            continue
        change = row["delta_nll"]
        table.add_row(
            row["name"], where, f"{row['touched']:,}", f"{row['ppl']:,.4g}", f"{_exp(change['mean']):.4g}",
            f"{_exp(change['low']):.4g} to {_exp(change['high']):.4g}", _share(row["sink_rate"]),
            _share(row["entropy_bits"]), f"{row['massive']:,}",
        )  # fmt: skip
    return table


def _audit(found: dict) -> str:
    enough = found["scalars"] is not None
    count = found["scalars"] if enough else max(found["tried"])
    few = "largest" if count == 1 else f"{count:,} largest"
    multiplies = "multiplies perplexity by ten or more" if enough else "does not multiply perplexity by ten"
    where = f"of the {found['of']:,} scalars of each sequence at layer {found['layer']}"
    return f"Audit: setting the {few} {where} to zero {multiplies}"


def _ranges(layers: list[int]) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "-"


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)


def _number(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def show_output(console: Console, out, verdict: dict) -> None:
    """What was written, and how to load it."""
    files = [path for path in out.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    console.print(f"\n{out}: {len(files)} files, {human(total)}" + ("" if verdict["passed"] else ", unverified"))
    console.print(f'Load it:  AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)', markup=False)
    console.print(f"Check it: surgery verify {out}", markup=False)
