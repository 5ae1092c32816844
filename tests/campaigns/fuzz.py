"""Changed files by the thousand, each given to the whole command line: one sentence and a code, and nothing else.

    bin/campaign fuzz [--count 30000] [--seed 0] [--kind NAME]... [--only KIND:NUMBER]

A try takes a good source or converted checkpoint, changes one file at random, and calls the command that reads it. It
holds where the command ends with 0, 1, 2 or 3, where any other end than 0 comes with one short sentence and no
traceback, where nothing raw reaches the terminal, where nothing is left on the disk, and where it all stays within 20
seconds and 1 GB. A try is known by its kind, seed and number, and can be run again alone.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.bench import IDS
from helpers.tiny_checkpoint import Ended, Place, build_place, rehash, surgery_command
from helpers.tiny_gguf import tiny_llama

from .isolated import watched
from .mutations import HOSTILE, as_json_bytes, bytes_edit

SECONDS, MEMORY = 20, 1 << 30
SENTENCE = 1000  # characters; a path may be part of it
TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    "{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ 'a' * 10**10 }}", "{{ 1/0 }}", "{{ messages[99].x.y }}",
    "{{ raise_exception('no') }}", "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "{% if %}",
    "{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__ }}", "{% set x = 'a' * 10**6 %}{{ x * 10**4 }}",
    "{% for a in range(9**4) %}{% for b in range(9**4) %}{{ b }}{% endfor %}{% endfor %}", "{{ [0] * 10**9 }}",
    "{{ strftime_now('%Y') }}", "{{ bos_token | center(10**9) }}", "{{ 10 ** 10 ** 8 }}", "",
)  # fmt: skip

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

Change = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Kind:
    """What is changed, how, and the command that reads it; `share`: its part of all tries."""

    name: str
    share: int
    home: str
    files: tuple[str, ...]
    change: Change
    command: Callable[[Ground], list]


@dataclass(frozen=True)
class Try:
    kind: str
    seed: int
    number: int


class Ground:
    """A directory of good checkpoints, of which a try changes one file and gets it back."""

    def __init__(self, root: Path, place: Place, gguf: Path) -> None:
        self.root = root
        for name in ("source", "sharded", "converted"):
            shutil.copytree(getattr(place, name), root / name)
        (root / "recipe").mkdir()
        shutil.copy(place.recipe, root / "recipe" / "recipe.yaml")
        (root / "recipe" / "ids.yaml").write_text(IDS)  # for what has no tokenizer
        (root / "gguf").mkdir()
        shutil.copy(gguf, root / "gguf" / "model.gguf")
        template = TEMPLATES[0].encode()
        for name in ("source", "converted"):
            (root / name / "chat_template.jinja").write_bytes(template)
            (root / name / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": [1]}')
        rehash(root / "converted")
        self.temporary = root / "tmp"
        self.temporary.mkdir()

    def plan(self, source: str, recipe: str = "recipe") -> list:
        return ["plan", self.root / "recipe" / f"{recipe}.yaml", self.root / source]

    def names(self) -> set[str]:
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*")}

    def attempt(self, one: Try) -> str | None:
        """What was wrong with how the command took it; None where it held."""
        kind = KINDS[one.kind]
        rng = random.Random(f"{one.kind} {one.seed} {one.number}")
        path = self.root / kind.home / rng.choice(kind.files)
        good, manifest = path.read_bytes(), (self.root / "converted" / "surgery.json").read_bytes()
        before = self.names()
        try:
            path.write_bytes(kind.change(rng, good))
            if kind.home == "converted" and path.name != "surgery.json":
                rehash(self.root / "converted")
            fault = complaint(surgery_command(*kind.command(self)))
            left = self.names() ^ before
            return fault or (f"left {sorted(left)[0]}" if left else None)
        except BaseException:  # whatever gets past the command line is a fault of it
            return traceback.format_exc(limit=-3)
        finally:
            path.write_bytes(good)
            (self.root / "converted" / "surgery.json").write_bytes(manifest)
            for name in self.names() - before:
                shutil.rmtree(self.root / name, ignore_errors=True)


def complaint(ended: Ended) -> str | None:
    """What is wrong with how a command ended; None where it is as it should be."""
    if ended.code not in (0, 1, 2, 3):
        return f"exit {ended.code}: {ended.err[-600:]}"
    if "Traceback" in ended.err:
        return f"a traceback: {ended.err[-600:]}"
    if raw := re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", ended.out + ended.err):
        return f"{raw.group()!r} reached the terminal: {ended.err[-300:]!r}"
    errors = [line for line in ended.err.splitlines() if line.startswith("error ")]
    if ended.code and (len(errors) != 1 or not ended.err.rstrip().endswith(errors[0])):
        return f"not one sentence at the end: {ended.err[-600:]}"
    if long := next((line for line in ended.err.splitlines() if len(line) > SENTENCE), None):
        return f"a line of {len(long):,} characters: {long[:200]}"
    return "memory ran out" if "memory ran out" in ended.err else None


def header_change(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, its length most often true."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return bytes_edit(rng, data, within=8 + size)
    header = as_json_bytes(rng, data[8 : 8 + size])
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, size, len(header) + 1, 2**40, 2**63))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def template_change(rng: random.Random, data: bytes) -> bytes:
    template = rng.choice(TEMPLATES)
    return template.encode() if rng.random() < 0.5 else bytes_edit(rng, template.encode() or b"{")


def recipe_change(rng: random.Random, data: bytes) -> bytes:
    """YAML with other values, lines out of order, or other bytes."""
    if rng.random() < 0.3:
        return bytes_edit(rng, data)
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at] += rng.choice((" x", " &a", " *a", " !!python/object:os.system", " |", " >", " {", " [", ": 1", "\t"))
    elif kind == 2:
        key, colon, _ = lines[at].partition(":")
        value = rng.choice(HOSTILE)
        lines[at] = f"{key}{colon} {getattr(value, 'text', value)!s}"[:200_000]
    elif kind == 3:
        lines.insert(at, lines[rng.randrange(len(lines))])
    else:
        lines[at] = " " * rng.randrange(9) + lines[at].lstrip()
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def gguf_change(rng: random.Random, data: bytes) -> bytes:
    return bytes_edit(rng, data, within=4096)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("header", 25, "source", ("model.safetensors",), header_change, lambda at: at.plan("source")),
        Kind("index", 10, "sharded", ("model.safetensors.index.json",), as_json_bytes, lambda at: at.plan("sharded")),
        Kind("config", 15, "source", ("config.json",), as_json_bytes, lambda at: at.plan("source")),
        Kind("converted config", 10, "converted", ("config.json",), as_json_bytes,
             lambda at: ["verify", at.root / "converted"]),
        Kind("manifest", 10, "converted", ("surgery.json",), as_json_bytes,
             lambda at: ["verify", at.root / "converted", "--against", at.root / "source"]),
        Kind("tokenizer", 5, "source", TOKENIZER, as_json_bytes, lambda at: at.plan("source")),
        Kind("converted tokenizer", 5, "converted", TOKENIZER, as_json_bytes,
             lambda at: ["verify", at.root / "converted", "--against", at.root / "source"]),
        Kind("template", 1, "source", ("chat_template.jinja",), template_change, lambda at: at.plan("source")),
        Kind("converted template", 1, "converted", ("chat_template.jinja",), template_change,
             lambda at: ["verify", at.root / "converted"]),
        Kind("recipe", 10, "recipe", ("recipe.yaml",), recipe_change, lambda at: at.plan("source")),
        Kind("gguf", 8, "gguf", ("model.gguf",), gguf_change, lambda at: at.plan("gguf/model.gguf", "ids")),
    )
}  # fmt: skip


def tries(count: int, seed: int, names: list[str]) -> list[Try]:
    """So many tries over the kinds, each kind by its share."""
    total = sum(KINDS[name].share for name in names)
    return [
        Try(name, seed, number) for name in names for number in range(max(1, round(count * KINDS[name].share / total)))
    ]


def campaign(wanted: list[Try], root: Path) -> Iterator[tuple[Try, str | None]]:
    """Each try and what was wrong with it. Works in `root`, which is filled first."""
    for name in ("place", "ground"):
        (root / name).mkdir()
    ground = Ground(root / "ground", build_place(root / "place"), tiny_llama(root / "tiny.gguf"))
    tempfile.tempdir, os.environ["TMPDIR"] = str(ground.temporary), str(ground.temporary)
    yield from watched(wanted, ground.attempt, SECONDS, MEMORY)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/campaign fuzz")
    parser.add_argument("--count", type=int, default=30_000, help="tries, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only this kind (repeatable)")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one try, again")
    given = parser.parse_args()
    if given.only:
        kind, _, number = given.only.rpartition(":")
        wanted = [Try(kind, given.seed, int(number))]
    else:
        wanted = tries(given.count, given.seed, given.kind or list(KINDS))
    held: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        for one, fault in campaign(wanted, Path(root)):
            held[one.kind] += fault is None
            if fault is not None:
                faults[one.kind] += 1
                print(f"{one.kind}:{one.number} {fault.strip()[:1500]}\n", flush=True)
    print(f"{'kind':<22}{'tried':>8}{'held':>8}")
    for name in dict.fromkeys(one.kind for one in wanted):
        print(f"{name:<22}{held[name] + faults[name]:>8,}{held[name]:>8,}")
    print(f"{'all':<22}{held.total() + faults.total():>8,}{held.total():>8,}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
