"""Parts of Markdown files that a script writes: what stands between two marks that name the part and the script."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def with_part(text: str, part: str, script: str, content: str) -> str:
    """`text` with `content` between the marks of `part`. ValueError where it has no such marks."""
    begin, end = f"<!-- {part}: written by {script} -->\n", f"<!-- end of {part} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"needs the line {begin.strip()!r} and, below it, {end.strip()!r}")
    before, rest = text.split(begin)
    return before + begin + content.strip("\n") + "\n" + end + rest.split(end)[1]


def update(script: str, parts: Sequence[tuple[str, str, str]], arguments: Sequence[str]) -> int:
    """Write `parts` (file below the root, name, content), or with --check only say which are out of date: exit code 1.

    Contents are Markdown; `script` is how a person calls the script that makes them.
    """
    stale = 0
    for file, part, content in parts:
        path = ROOT / file
        text = path.read_text(encoding="utf-8")
        try:
            wanted = with_part(text, part, script, content)
        except ValueError as error:
            sys.exit(f"{file} {error}")
        if text == wanted:
            continue
        if "--check" in arguments:
            print(f"{file}: {part} is out of date; run {script}")
            stale = 1
        else:
            path.write_text(wanted, encoding="utf-8")
    return stale
