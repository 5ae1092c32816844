"""What the campaigns share: commands on a tiny checkpoint, each trial in a process of its own, and its table.

A process needs seconds to import torch. So one imports everything, and forks a child for each trial, with signals as a
shell would give them.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # threads do not fork

LIMIT = 120.0  # seconds after which a process counts as hung
MEASURED = ("--chunks", "4", "--chunk-length", "32")


@dataclass
class Ended:
    """How a process ended: its exit code (negative: by a signal), what it told, and after how many seconds."""

    code: int
    err: str
    seconds: float


class Bench:
    """A tiny checkpoint, a GGUF, their conversions, and commands on them; `trial` is anew for each process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trial = root / "trial"
        self.out, self.temporary = self.trial / "out", self.trial / "tmp"
        self.outputs: dict[int, Path] = {}  # by child

    def build(self) -> None:
        from helpers.tiny_checkpoint import build_place, surgery_command
        from helpers.tiny_gguf_text import save_gguf

        place = build_place(self.root)
        save_gguf(self.root / "tiny.gguf")
        ended = surgery_command(
            "run", place.recipe, self.root / "tiny.gguf", self.root / "from-gguf", "--text", place.text, *MEASURED
        )
        assert ended.code == 0, ended.err

    def commands(self) -> dict[str, list[str]]:
        """By name; what they write is in `trial`."""
        recipe, source, gguf = self.root / "recipe.yaml", self.root / "source", self.root / "tiny.gguf"
        text = ["--text", str(self.root / "evaluation.txt"), *MEASURED]
        found = ["--json", str(self.trial / "found.json")]
        return {
            "run": ["run", str(recipe), str(source), str(self.out), *text, *found],
            "run of a GGUF": ["run", str(recipe), str(gguf), str(self.out), *text],
            "verify": ["verify", str(self.root / "converted"), "--against", str(source), *text, *found],
            "verify of a GGUF": ["verify", str(self.root / "from-gguf"), "--against", str(gguf), *text],
            "scan of a GGUF": ["scan", str(gguf), *text, *found],
        }

    def anew(self) -> None:
        shutil.rmtree(self.trial, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    def left(self) -> list[str]:
        """What lies about, hidden or temporary; not what the command was to write."""
        names = sorted(
            path.name for path in self.trial.iterdir() if path.name not in ("tmp", "out", "found.json", "steps")
        )
        return names + sorted(f"tmp/{path.name}" for path in self.temporary.iterdir())

    def start(self, arguments: Sequence[str], before: Callable[[], None] = lambda: None) -> int:
        """Fork a child that is the command, and calls `before` first; its id."""
        output = self.root / f"output-{len(self.outputs)}.txt"
        if child := os.fork():
            self.outputs[child] = output
            return child
        code = 99
        try:
            before()
            code = self._command(arguments, output)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, child: int, since: float) -> Ended:
        while time.monotonic() - since < LIMIT:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return Ended(os.waitstatus_to_exitcode(status), self.told(child), time.monotonic() - since)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Ended(-999, self.told(child) + "\nhung", LIMIT)

    def told(self, child: int) -> str:
        """What it has said on standard error."""
        output = self.outputs[child]
        return output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""

    def durations(self) -> dict[str, float]:
        """Seconds that each command takes if nobody disturbs it."""
        took = {}
        for name, arguments in self.commands().items():
            self.anew()
            ended = self.call(arguments)
            if ended.code != 0 or self.left():
                raise SystemExit(f"{name} fails undisturbed ({ended.code}), and leaves {self.left()}: {ended.err}")
            took[name] = ended.seconds
        return took

    def call(self, arguments: Sequence[str], before: Callable[[], None] = lambda: None) -> Ended:
        return self.wait(self.start(arguments, before), time.monotonic())

    def _command(self, arguments: Sequence[str], output: Path) -> int:
        os.setsid()
        for number, path, flags in (
            (1, os.devnull, os.O_WRONLY),
            (2, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            opened = os.open(path, flags)
            os.dup2(opened, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.environ["TMPDIR"], tempfile.tempdir = str(self.temporary), None
        sys.argv = ["surgery", *arguments]
        from surgery import cli

        try:
            cli.main()
        except SystemExit as ended:
            atexit._run_exitfuncs()  # as at the end of an interpreter
            return ended.code if isinstance(ended.code, int) else 0
        raise AssertionError("the command line returned")


def preload() -> None:
    """Import what commands import, in this process."""
    import accelerate  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import surgery.cli.entry  # noqa: F401
    import surgery.verbs.run
    import surgery.verbs.scan
    import surgery.verbs.verify  # noqa: F401

    torch.set_num_threads(1)


def built(bench: Bench) -> Bench:
    """Have a child build it: what has trained a tokenizer has threads, and does not fork well."""
    if not (child := os.fork()):
        code = 1
        try:
            bench.build()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the tiny checkpoint could not be built")
    return bench


def asked(description: str, **counts: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    return parser.parse_args()


class Table:
    """What was tried, what held, and each failure in full."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.notes: dict[str, Counter[str]] = {}
        self.failures: list[str] = []

    def add(self, what: str, note: str, faults: Sequence[str], ended: Ended) -> None:
        self.tried[what] += 1
        self.notes.setdefault(what, Counter())[note] += 1
        if faults:
            self.failures.append(f"{what}: {note}: {'; '.join(faults)}\n    " + ended.err.replace("\n", "\n    "))
            print(self.failures[-1], file=sys.stderr, flush=True)
        if (tried := sum(self.tried.values())) % 50 == 0:
            print(f"{tried} trials, {len(self.failures)} failures", file=sys.stderr, flush=True)

    def show(self) -> int:
        """Print it; the exit code."""
        for what, count in sorted(self.tried.items()):
            held = ", ".join(f"{note} {n}" for note, n in sorted(self.notes[what].items()))
            print(f"{what:36} {count:5}   {held}")
        print(f"{sum(self.tried.values())} trials, {len(self.failures)} failures")
        print(*self.failures, sep="\n")
        return int(bool(self.failures))


def campaign(trials: Callable[[Bench, Table], None]) -> int:
    """Build a bench, hold the trials, show their table; the exit code."""
    preload()
    root = Path(tempfile.mkdtemp()).resolve()  # not TemporaryDirectory: each child would remove it at its own exit
    try:
        table = Table()
        trials(built(Bench(root)), table)
        return table.show()
    finally:
        shutil.rmtree(root)
