#!/usr/bin/env python3
"""Check that what Markdown files link to exists: relative paths, and headings of Markdown files. Nothing is fetched.

bin/links.py FILE...
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

CODE = re.compile(r"^(```|~~~).*?^\1|(`+)(?!`).*?(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(
    r"\]\(\s*<?([^\s)>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)|(?:href|src)=\"([^\"]+)\"", re.MULTILINE
)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)  # another host


def links(text: str) -> Iterator[tuple[int, str]]:
    """(line, target) of each link in Markdown, code left out."""
    prose = CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for match in LINK.finditer(prose):
        yield prose.count("\n", 0, match.start()) + 1, next(group for group in match.groups() if group)


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a Markdown file: of its headings, as GitHub names them, and those written as HTML."""
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r"<[^<>]*\b(?:id|name)=\"([^\"]+)\"", text))
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.S | re.M), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = seen[anchor] = seen.get(anchor, -1) + 1
        found.add(f"{anchor}-{count}" if count else anchor)
    return frozenset(found)


def fault(path: Path, target: str) -> str | None:
    """Why the link `target` in the file `path` leads nowhere, or None."""
    place, _, anchor = unquote(target).partition("#")
    other = path.parent / place if place else path
    if not other.exists():
        return f"{place} does not exist"
    if anchor and (other.suffix != ".md" or anchor not in anchors(other)):
        return f"{other} has no heading #{anchor}"
    return None


def main(arguments: list[str]) -> int:
    count = 0
    for path in map(Path, arguments):
        for line, target in links(path.read_text(encoding="utf-8")):
            if not ELSEWHERE.match(target) and (why := fault(path, target)):
                print(f"{path}:{line}: {why}")
                count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
