"""Ask commands to end at random moments, once or twice in a row: the right exit code, one sentence, nothing left.

    bin/campaign signals [--count 100] [--starts 20] [--seed 0]

The last so many are true starts of an interpreter, ended in their first two seconds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

from helpers import ROOT

from .trials import Bench, Ended, Table, asked, campaign

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def faults_of(bench: Bench, ended: Ended, sent: list[signal.Signals]) -> tuple[str, list[str]]:
    """What the end was, and what is wrong with it."""
    faults = [f"left {bench.left()}"] if bench.left() else []
    if "Traceback" in ended.err or "Exception ignored" in ended.err:
        faults.append("a traceback")
    sentences = [line for line in ended.err.splitlines() if line.startswith("error ")]
    if ended.code == 0:
        return "done before", faults + (["done, and an error told"] if sentences else [])
    if ended.code not in [128 + number for number in sent]:
        faults.append(f"exit code {ended.code}")
    if len(sentences) != 1 or not ended.err.rstrip("\n").endswith(sentences[-1] if sentences else "."):
        faults.append(f"{len(sentences)} sentences, or more after it")
    published = bench.out.exists()
    if published and str(bench.out) not in ended.err:
        faults.append("OUT is there, and not a word about it")
    return "ended, OUT complete" if published else "ended", faults


def forked(bench: Bench, table: Table, name: str, delay: float, gaps: list[float], sent: list[signal.Signals]) -> None:
    bench.anew()
    since = time.monotonic()
    child = bench.start(bench.commands()[name])
    for pause, number in zip([delay, *gaps], sent, strict=True):
        time.sleep(pause)
        os.kill(child, number)  # it is not waited for yet, so its id is its own
    ended = bench.wait(child, since)
    if ended.code in [-number for number in sent] and not ended.err:
        table.add(name, "before the command began", [], ended)
        return
    note, faults = faults_of(bench, ended, sent)
    table.add(name, f"{note} ({' '.join(number.name for number in sent)})", faults, ended)


def started(bench: Bench, table: Table, delay: float, number: signal.Signals) -> None:
    bench.anew()
    output = bench.root / "started.txt"
    with output.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "surgery", *bench.commands()["run"]],
            stdout=subprocess.DEVNULL, stderr=err, cwd=bench.root, preexec_fn=_default_signals,
            env={**os.environ, "TMPDIR": str(bench.temporary), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    since = time.monotonic()
    time.sleep(delay)
    process.send_signal(number)
    process.wait()
    ended = Ended(process.returncode, output.read_text(encoding="utf-8", errors="replace"), time.monotonic() - since)
    early = ended.code == -number or ended.err.rstrip().endswith("KeyboardInterrupt")
    if early and str(ROOT / "surgery") not in ended.err:
        table.add("start", "before the first line of surgery", [], ended)
        return
    note, faults = faults_of(bench, ended, [number])
    table.add("start", f"{note} ({number.name})", faults, ended)


def _default_signals() -> None:
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL)


def main() -> int:
    given = asked(__doc__ or "", count=100, starts=20, seed=0)

    def trials(bench: Bench, table: Table) -> None:
        chance, took = random.Random(given.seed), bench.durations()
        for number in range(given.count):
            name = list(took)[number % len(took)]
            sent = [chance.choice(ASKING) for _ in range(1 + number % 2)]
            gaps = [chance.uniform(0.001, 0.05) for _ in sent[1:]]
            forked(bench, table, name, chance.uniform(0, 1.05 * took[name]), gaps, sent)
        for _ in range(given.starts):
            started(bench, table, chance.uniform(0, 2), chance.choice(ASKING))

    return campaign(trials)


if __name__ == "__main__":
    sys.exit(main())
