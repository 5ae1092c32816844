"""Progress and tables on the terminal, by rich. Long work reports through one object, which tests and libraries can leave out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .checkpoint.stage import human


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
        self.console.print(f"[bold]•[/] {text}")

    def note(self, text: str) -> None:
        self.console.print(f"  [yellow]note[/] {text}")

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None) -> Iterator:
        columns = (SpinnerColumn(), TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count, what: progress.update(task, advance=count, description=what)


# ---- tables


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def show_plan(console: Console, plan: dict) -> None:
    kind, slots = plan["model_type"], plan["n_slots"]
    count = f"up to {slots['max']}" if isinstance(slots, dict) else str(slots)
    console.print(f"[bold]{plan['source']['spec']}[/]  {kind['from']} → {kind['to']}, {count} slots in each of {plan['sites']} sites\n")
    files = _table("Files", "name", "action", "bytes")
    for file in plan["files"]:
        files.add_row(file["name"], file["action"], "" if file["bytes"] is None else f"{file['bytes']:,}")
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
    console.print(f"\nDisk: {human(disk['needed'])} needed, {human(disk['free'])} free. All tensors by name: --json FILE")


def show_verdict(console: Console, verdict: dict) -> None:
    if verdict.get("perplexity"):
        console.print(_perplexity_table(verdict))
        console.print()
    if verdict.get("massive_activations"):
        console.print(_massive_table(verdict["massive_activations"]))
        console.print()
    gates = _table("Gates", "gate", "value", "limit", "")
    for gate in verdict["gates"]:
        gates.add_row(gate["name"], _number(gate["value"]), _number(gate["limit"]), "[green]passed[/]" if gate["passed"] else "[red]FAILED[/]")
    console.print(gates)
    for check in verdict["integrity"]["checks"]:
        if not check["passed"]:
            console.print(f"[red]{check['name']}[/]: {check['detail']}")


def _perplexity_table(verdict: dict) -> Table:
    table = _table("Perplexity", "variant", "perplexity", "nats/token", "tokens", "against bare, 95% interval")
    labels = {"bare": "original, bare", "bos": "original + BOS", "control": "original + prefix", "converted": "converted"}
    differences = verdict.get("delta_nll") or {}
    for key, label in labels.items():
        score = verdict["perplexity"].get(key)
        if score is None:
            continue
        interval = differences.get("vs_bare") if key == "converted" else None
        shown = f"{interval['mean']:+.5f} [{interval['low']:+.5f}, {interval['high']:+.5f}]" if interval else ""
        table.add_row(label, f"{score['ppl']:.4f}", f"{score['nll']:.6f}", f"{score['tokens']:,}", shown)
    return table


def _massive_table(found: dict) -> Table:
    table = _table("Massive activations", "", "count", "worst / median", "layers", "dims", "tokens")
    for when, label in (("before", "before"), ("after", "after")):
        entry = found.get(when)
        if entry is None:
            continue
        tokens = ", ".join(repr(token) for token in entry.get("tokens", [])[:4]) or "-"
        dims = ", ".join(map(str, entry["dims"][:4])) or "-"
        table.add_row(label, f"{entry['count']:,}", f"{entry['worst_ratio']:,.0f}" if entry["count"] else "-", _ranges(entry["layers"]), dims, tokens)
    return table


def show_survey(console: Console, survey: dict) -> None:
    table = _table(f"Survey of {survey['source']}", "layer", "max", "median", "ratio", "massive", "dims", "|x_0|", "|x_i|", "sink rate")
    for row in survey["layers"]:
        dims = ", ".join(str(dim) for dim in dict.fromkeys(entry["dim"] for entry in row["massive"])) or "-"
        sink = f"{row['sink_rate']:.2f}" if row.get("sink_rate") is not None else ""
        table.add_row(
            str(row["layer"]), f"{row['max']:,.1f}", f"{row['median']:.3f}", f"{row['ratio']:,.0f}", str(row["count"]), dims,
            f"{row['first_norm']:,.1f}", f"{row['rest_norm']:,.1f}", sink,
        )  # fmt: skip
    console.print(table)
    total = survey["massive_activations"]
    console.print(
        f"\n{total['count']:,} massive activations in {survey['chunks']} x {survey['chunk_length']} tokens"
        + (f", dims {total['dims'][:6]}, layers {_ranges(total['layers'])}" if total["count"] else "")
        + f"; perplexity {survey['perplexity']['ppl']:.4f}"
    )


def _ranges(layers: list[int]) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "-"


def _number(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def show_output(console: Console, out, verdict: dict) -> None:
    """What was written, and how to load it."""
    files = [path for path in out.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    console.print(f"\n{out}: {len(files)} files, {human(total)}" + ("" if verdict["passed"] else ", unverified"))
    console.print(f'Load it:  AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)', markup=False)
    console.print(f"Check it: surgery verify {out}", markup=False)
