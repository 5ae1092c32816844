#!/usr/bin/env python3
"""Check that imports between the rooms of surgery/ point downwards; print file:line of each that does not.

    bin/layers.py [PACKAGE_DIRECTORY]

A room is a folder or module directly in the package; surgery/README.md says what each is for. `import` inside functions
and under TYPE_CHECKING counts as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# From top to bottom. Rooms on one line do not import each other, except a neighbour's `base`: its protocol.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("verbs",),
    ("steps",),
    ("report",),
    ("operations", "tuning", "verification", "delivery"),
    ("converted",),
    ("survey",),
    ("live",),
    ("parts",),
    ("anatomy", "recipe"),
    ("checkpoint",),
    ("endings",),
    ("runtime", "serving"),
)
# For every room; each may know those after it.
BESIDE = ("table", "bounded", "words", "progress", "errors", "plain", "version", "results")
ALONE = ("runtime", "serving")  # copied into checkpoints, or run beside vLLM: they import nothing of ours
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path, package: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, module path below the package) of each import of ours in the file; an empty path is the package itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = [package.name, *path.relative_to(package).parts[: -node.level]] if node.level else []
            start += node.module.split(".") if node.module else []
            names = [[*start, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == package.name:
                yield node.lineno, tuple(name[1:])


def fault(room: str, target: tuple[str, ...]) -> str | None:
    """Why `room` may not import `target`, or None."""
    other = target[0] if target else "__init__"
    if other == room:
        return None
    if room in ALONE:
        return f"{room} runs without the rest, and imports nothing of ours"
    if room in BESIDE:
        below = BESIDE[BESIDE.index(room) + 1 :]
        return None if other in below else f"{room} is for every room and may know only {', '.join(below) or 'none'}"
    if other in BESIDE:
        return None
    if other not in FLOOR:
        other = "__init__"  # a name that the package itself defines, such as __version__
    if FLOOR[room] > FLOOR[other]:
        return f"{room} lies below {other}"
    if FLOOR[room] == FLOOR[other] and "base" not in target:
        return f"{room} lies beside {other}, of which it may know no more than base"
    return None


def main(arguments: list[str]) -> int:
    package = Path(arguments[0] if arguments else "surgery")
    count = 0
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room not in FLOOR and room not in BESIDE:
            print(f"{path}: {room} has no floor; give it one in bin/layers.py")
            count += 1
            continue
        for line, target in imports(path, package):
            if why := fault(room, target):
                print(f"{path}:{line}: {'.'.join((package.name, *target))}: {why}")
                count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
