"""What writing a checkpoint costs, against `cp` and `sync` of the same files, side by side in one run.

    bench_write.py [GIB]               the table, on a checkpoint of so many GiB (2) among temporary files
    bench_write.py WAY SOURCE TARGET   one way, in a process of its own; its peak memory above a bare interpreter's

Copies are of shards whose hash is known, as a run knows it. A shard is rewritten where one of its tensors has changed:
all of it is read, hashed and written. The clock stops when everything is on the disk.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from surgery.checkpoint.copying import sha256_of
from surgery.checkpoint.layout import read_layout
from surgery.checkpoint.reading import read_tensors
from surgery.checkpoint.stage import Stage

ROUNDS, SHARD = 3, 2**29  # bytes
WAYS = {"copy": "shards as they are", "rewrite": "one tensor of each changed", "link": "shards hard-linked (--link)"}


def make(root: Path, gib: float) -> Path:
    """A checkpoint of shards of half a GiB, tensors of 32 MiB of random bfloat16."""
    root.mkdir()
    weight_map: dict[str, str] = {}
    for number in range(max(1, round(gib * 2**30 / SHARD))):
        name = f"model-{number + 1:05d}.safetensors"
        tensors = {f"{number}.{i}": torch.randn(2048, 8192).bfloat16() for i in range(16)}
        save_file(tensors, root / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    hashes = {path.name: sha256_of(path) for path in root.glob("*.safetensors")}
    (root / "hashes.json").write_text(json.dumps(hashes))
    return root


def write(way: str, source: Path, target: Path) -> None:
    layout, hashes = read_layout(source), json.loads((source / "hashes.json").read_text())
    with Stage(target) as stage:
        for shard in layout.shards:
            if way == "rewrite":
                name = layout.of_shard(shard)[3].name
                stage.add_changed(layout, shard, shard, {name: read_tensors(layout, [name])[name] * 2})
            else:
                stage.add_file(source / shard, shard, link=way == "link", sha256=hashes[shard])
        stage.publish()


def timed(way: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds, and peak bytes of the process above what it had when the work began."""
    if way == "cp":
        begun = time.perf_counter()
        subprocess.run(["cp", "-r", source, target], check=True)
        os.sync()
        took, peak = time.perf_counter() - begun, 0
    else:
        command = [sys.executable, __file__, way, str(source), str(target)]
        took, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(target)
    os.sync()
    return took, peak


def alone(way: str, source: Path, target: Path) -> None:
    before, begun = _peak(), time.perf_counter()
    write(way, source, target)
    print(json.dumps([time.perf_counter() - begun, _peak() - before]))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in WAYS:
        alone(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
        return
    gib = float(sys.argv[1]) if sys.argv[1:] else 2.0
    seconds: dict[str, list[float]] = {way: [] for way in ("cp", *WAYS)}
    peaks = dict.fromkeys(WAYS, 0)
    with tempfile.TemporaryDirectory() as scratch:
        source = make(Path(scratch) / "source", gib)
        os.sync()
        for _ in range(ROUNDS):
            for way in seconds:
                took, peak = timed(way, source, Path(scratch) / "target")
                seconds[way].append(took)
                if way in peaks:
                    peaks[way] = max(peaks[way], peak)
    plain = statistics.median(seconds["cp"])
    table = Table(title=f"{gib:g} GiB in shards of half a GiB, median of {ROUNDS} rounds", title_justify="left")
    for column in ("", "seconds", "times cp and sync", "peak memory above its start"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("cp, sync", f"{plain:.2f}", "1", "")
    for way, words in WAYS.items():
        took = statistics.median(seconds[way])
        table.add_row(words, f"{took:.2f}", f"{took / plain:.2f}", f"{peaks[way] / 2**20:.0f} MiB")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
