"""Kill commands at random moments: OUT is then absent or verifies, and `surgery clean` removes all that was left.

bin/campaign kill [--count 200] [--seed 0]
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from .trials import Bench, Table, asked, campaign


def trial(bench: Bench, table: Table, name: str, delay: float) -> None:
    bench.anew()
    since = time.monotonic()
    child = bench.start(bench.commands()[name])
    time.sleep(delay)
    living = bench.call(["clean", str(bench.trial)]) if delay % 0.01 < 0.002 else None  # beside a process that lives
    os.kill(child, signal.SIGKILL)
    ended = bench.wait(child, since)
    faults = [] if ended.code in (0, -signal.SIGKILL) else [f"exit code {ended.code}"]
    if living is not None and living.code != 0:
        faults.append(f"clean beside it: {living.code}")
    left, note = bench.left(), "done" if ended.code == 0 else "killed"
    if left and ended.code == 0 and living is None:
        faults.append(f"done, and left {left}")
    cleaned = bench.call(["clean", str(bench.trial)])
    if cleaned.code != 0 or bench.left():
        faults.append(f"after clean ({cleaned.code}): {bench.left()} of {left}; {cleaned.err}")
    if bench.out.exists():
        note += ", OUT complete"
        verified = bench.call(["verify", str(bench.out)])
        if verified.code != 0:
            faults.append(f"OUT does not verify: {verified.err}")
    if left:
        note += ", something left and cleaned"
    table.add(name, note, faults, ended)


def main() -> int:
    given = asked(__doc__ or "", count=200, seed=0)

    def trials(bench: Bench, table: Table) -> None:
        chance, took = random.Random(given.seed), bench.durations()
        for number in range(given.count):
            name = list(took)[number % len(took)]
            trial(bench, table, name, chance.uniform(0, 1.05 * took[name]))

    return campaign(trials)


if __name__ == "__main__":
    sys.exit(main())
