"""Cut off runs with `--resume`, and go on: the files are those of a run that nobody disturbed, whenever it was cut off.

bin/campaign resume [--count 200] [--seed 0]

A run is killed at so many random moments, and at each of its calls of fsync, rename, replace and copy_file_range, or is
given ENOSPC or EIO there; half of the runs come layer by layer. Then it is killed once more, or not, and goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .trials import MEASURED, Bench, Ended, Table, asked, campaign

CALLS = ("fsync", "rename", "replace", "copy_file_range")
DATED = ("surgery.json", "README.md")


class Resumed:
    """Two commands on the bench, what they write undisturbed, and how often they make each call."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.files, self.took = bench, {}, {}
        self.calls: dict[str, dict[str, int]] = {}
        recipe, source = str(bench.root / "recipe.yaml"), bench.root / "source"
        text = ["--text", str(bench.root / "evaluation.txt"), *MEASURED]
        plain = ["run", recipe, str(source), str(bench.out), *text, "--resume", str(bench.trial / "steps")]
        self.commands = {"run": plain, "run, layer by layer": [*plain, "--memory", f"{self._least(source)}B"]}
        for name in self.commands:
            bench.anew()
            counted = bench.root / "calls.json"
            ended = bench.call(self.commands[name], lambda counted=counted: _count(counted))
            if ended.code != 0:
                raise SystemExit(f"{name} fails undisturbed: {ended.err}")
            self.files[name], self.took[name] = _files(bench.out), ended.seconds
            self.calls[name] = json.loads(counted.read_text())

    def _least(self, source: Path) -> int:
        """Too little memory for all weights at once."""
        answer = self.bench.root / "least"
        if not (child := os.fork()):
            from surgery.steps.plan import prepare
            from surgery.steps.recipe import load_recipe

            plan = prepare(load_recipe("eab"), str(source), None, needs_tokenizer=False)
            answer.write_text(str(plan.memory()["least"]))
            os._exit(0)
        os.waitpid(child, 0)
        return int(answer.read_text())

    def go_on(self, name: str) -> tuple[list[str], Ended]:
        """Run again after a run was cut off: what is wrong then."""
        if self.bench.out.exists():  # published, and then cut off
            shutil.rmtree(self.bench.out) if _files(self.bench.out) == self.files[name] else None
        ended = self.bench.call(self.commands[name])
        if ended.code != 0:
            return [f"does not go on: {ended.code}"], ended
        faults = [] if _files(self.bench.out) == self.files[name] else ["other files than undisturbed"]
        cleaned = self.bench.call(["clean", str(self.bench.trial)])
        if cleaned.code != 0 or self.bench.left():
            faults.append(f"after clean: {self.bench.left()}")
        return faults, ended


def _files(out: Path) -> dict[str, str]:
    """Hash of each file that holds no date, and of the manifest without it."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.name not in DATED
    }
    manifest = json.loads((out / "surgery.json").read_text())
    del manifest["provenance"], manifest["files"]["README.md"]
    return {**found, "surgery.json": json.dumps(manifest, sort_keys=True)}


def _each_call(act: Callable[[str, int], None]) -> None:
    """Have `act(name, number)` called before each of `CALLS` that this process makes."""
    for name in CALLS:
        real, made = getattr(os, name), [0]

        def wrapped(*arguments, name=name, real=real, made=made, **named):
            made[0] += 1
            act(name, made[0])
            return real(*arguments, **named)

        setattr(os, name, wrapped)


def _count(into: Path) -> None:
    counts = dict.fromkeys(CALLS, 0)

    def note(name: str, number: int) -> None:
        counts[name] = number
        into.write_text(json.dumps(counts))

    into.write_text(json.dumps(counts))
    _each_call(note)


def _disturbed(call: str, number: int, how: int | None) -> Callable[[], None]:
    """At that call a child is killed, or is given this error."""

    def act(name: str, made: int) -> None:
        if (name, made) == (call, number):
            if how is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(how, os.strerror(how))

    return lambda: _each_call(act)


def at_a_moment(resumed: Resumed, table: Table, name: str, chance: random.Random) -> None:
    bench, times = resumed.bench, 1 + (chance.random() < 0.3)
    bench.anew()
    for _ in range(times):
        since = time.monotonic()
        child = bench.start(resumed.commands[name])
        time.sleep(chance.uniform(0, 1.02 * resumed.took[name]))
        os.kill(child, signal.SIGKILL)
        bench.wait(child, since)
    faults, ended = resumed.go_on(name)
    table.add(name, f"killed {times} times", faults, ended)


def at_each_call(resumed: Resumed, table: Table, name: str) -> None:
    bench = resumed.bench
    for call, count in resumed.calls[name].items():
        for number in range(1, count + 1):
            for how in (None, errno.ENOSPC, errno.EIO):
                bench.anew()
                cut = bench.call(resumed.commands[name], _disturbed(call, number, how))
                faults, ended = resumed.go_on(name)
                if how is not None and cut.code not in (0, 2, 3):
                    faults.append(f"exit code {cut.code}: {cut.err}")
                table.add(f"{name}, {call}", "killed" if how is None else errno.errorcode[how], faults, ended)


def main() -> int:
    given = asked(__doc__ or "", count=200, seed=0)

    def trials(bench: Bench, table: Table) -> None:
        chance, resumed = random.Random(given.seed), Resumed(bench)
        for name in resumed.commands:
            at_each_call(resumed, table, name)
        for number in range(given.count):
            at_a_moment(resumed, table, list(resumed.commands)[number % 2], chance)

    return campaign(trials)


if __name__ == "__main__":
    sys.exit(main())
