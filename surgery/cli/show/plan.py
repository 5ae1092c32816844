"""The plan, and what was written by it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ...words import human
from .tables import new_table

STATUSES = ("added", "changed", "may change", "quantised", "emptied", "kept")


def show_plan(console: Console, plan: dict) -> None:
    kind = plan["model_type"]
    console.print(f"[bold]{escape(plan['source']['spec'])}[/]")
    console.print(f"{kind['from']} to {kind['to']}, {', '.join(plan['adds'])}")
    if (packed := plan["quantised"]) is not None:
        console.print(escape(f"{packed['format']}; {human(packed['bytes'])} packed, kept byte for byte"))
    if (written := plan.get("quantise")) is not None:
        console.print(f"{written['layers']:,} linear layers written in few bits: {written['scheme']}")
    if plan["tune"] is not None:
        console.print(_trained(plan["tune"], plan["trains"]))
    console.print()
    files = new_table("Files", "name", "action", "bytes")
    for file in plan["files"]:
        files.add_row(escape(file["name"]), file["action"], "" if file["bytes"] is None else f"{file['bytes']:,}")
    console.print(files)
    console.print()
    statuses = new_table("Tensors", "status", "count", "example", "dtype", "shape")
    for status in STATUSES:
        named = [(name, entry) for name, entry in plan["tensors"].items() if entry["status"] == status]
        if named:
            name, entry = named[0]
            shape = " x ".join(map(str, entry["shape"]))
            statuses.add_row(status, f"{len(named):,}", escape(name), entry["dtype"], shape)
    console.print(statuses)
    for note in plan["notes"]:
        console.print(f"\nNote: {note}.", markup=False)
    if plan["download"]:
        console.print(f"\nDownload: {human(plan['download'])} of weights, which a run fetches")
    console.print(f"\n{memory_needed(plan['memory'])}")
    console.print("\nAll tensors by name: --json FILE")


def memory_needed(memory: Mapping[str, Any]) -> str:
    """How a run would hold the model, and what that takes."""
    if not memory["layer_by_layer"]:
        return f"Memory: {human(memory['peak'])}, all weights at once"
    return (
        f"Memory: {human(memory['peak'])} or more, layer by layer: all weights at once would take "
        f"{human(memory['resident'])}, and {human(memory['allowed'])} may be taken; each pass over them reads "
        f"{human(memory['read_each_pass'])}"
    )


def planned(plan: Mapping[str, Any]) -> str:
    """The plan in one line."""
    counts = Counter(entry["status"] for entry in plan["tensors"].values())
    tensors = ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if counts[status])
    disk = plan["disk"]
    return f"planned: tensors {tensors}; disk {human(disk['needed'])} needed, {human(disk['free'])} free"


def _trained(tune: dict, trains: list[str]) -> str:
    parts = list(trains)
    if lora := tune["lora"]:
        parts.append(f"LoRA of rank {lora['rank']} on {lora['layers']:,} linear layers, merged into them")
    return f"then tuned, up to {tune['steps']:,} steps: {'; '.join(parts)}"


def show_pushed(console: Console, pushed: Mapping[str, Any]) -> None:
    """Where it is on the hub, and who can see it."""
    seen = "private, until you make it public in its settings" if pushed["private"] else "public"
    console.print(f"\nPushed:   {pushed['url']} ({seen})", markup=False)
    console.print(f"Check it: surgery verify {pushed['id']}", markup=False)


def show_output(console: Console, out, verdict: Mapping[str, Any]) -> None:
    """What was written, and how to load it."""
    files = [path for path in out.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    state = "" if verdict["passed"] else ", unverified"
    console.print(f"\n{out}: {len(files)} files, {human(total)}{state}", markup=False)
    console.print(f'Load it:  {_auto_of(out)}.from_pretrained("{out}", trust_remote_code=True)', markup=False)
    console.print(f"Check it: surgery verify {out} --digest {verdict['digest']}", markup=False)


def _auto_of(out: Path) -> str:
    """The Auto class that loads what was written, as its own class."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    found: str = next(
        auto for auto, name in config["auto_map"].items() if name.endswith(f".{config['architectures'][0]}")
    )
    return found
