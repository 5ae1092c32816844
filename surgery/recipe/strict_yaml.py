"""Reading YAML that a person wrote: plain values, and the line each of them stands on.

YAML 1.2 (`1e-4` is a number, `no` is text) without tags, anchors, directives or a second document: a recipe has no use
for them, and they are how a small file grows into a large object. Duplicate keys are problems, not overwritten values.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..errors import RecipeError

MAX_BYTES = 64 * 1024  # a recipe is a page, not a data file
MAX_DEPTH = 16  # nesting; a recipe needs 6

Key = tuple[str | int, ...]
Problem = tuple[int, str]  # line, and a sentence without its full stop


def read_yaml(text: str, name: str) -> tuple[Any, dict[Key, int], list[Problem]]:
    """(plain value, line of every key, problems) of YAML `text`; `name` stands for the file in messages.

    Text that is not YAML, or that holds what is not allowed here, raises RecipeError. A problem is something that the
    text shows and the value no longer does: a duplicate key, a key that is not a word.
    """
    root = _compose(text, name)
    lines: dict[Key, int] = {(): root.start_mark.line + 1}
    problems: list[Problem] = []
    return _plain(root, (), lines, problems), lines, problems


def _compose(text: str, name: str) -> Node:
    """The YAML node tree, which knows the line of every node; RecipeError for what a recipe may not hold."""
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{name}: longer than {MAX_BYTES // 1024} KiB, which no recipe is; give a recipe file.")
    directive = re.search(r"^%", text, re.MULTILINE)
    if directive:
        line = text.count("\n", 0, directive.start()) + 1
        raise RecipeError(f"{name}, line {line}: YAML directives (%...) are not allowed; remove it.")
    try:
        refused = _refused_event(text)
        if refused:
            raise RecipeError(f"{name}, line {refused[0]}: {refused[1]}.")
        root = YAML(typ="rt", pure=True).compose(text)
    except (YAMLError, ValueError) as error:  # ValueError: an escape such as "\U00110000" that is no character
        mark = getattr(error, "problem_mark", None) if isinstance(error, MarkedYAMLError) else None
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        what = " ".join(str(what).split())
        raise RecipeError(f"{name}, line {line}: not valid YAML ({what}); mend the text there.") from error
    if root is None:
        raise RecipeError(f"{name}, line 1: the recipe is empty; start it with 'surgery: 1' and 'operations:'.")
    return root


def _refused_event(text: str) -> Problem | None:
    """(line, sentence) of the first construct that is YAML but has no place in a recipe. Nothing is built yet."""
    depth = documents = 0
    for event in YAML(typ="rt", pure=True).parse(text):
        line = event.start_mark.line + 1
        kind = type(event).__name__
        if getattr(event, "anchor", None):
            return line, f"anchors and aliases ('{event.anchor}') are not allowed; write the value out"
        if getattr(event, "tag", None):
            return line, f"the tag '{event.tag}' is not allowed; write the plain value"
        documents += kind == "DocumentStartEvent"
        if documents > 1:
            return line, "a second document starts here; keep one recipe in a file"
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > MAX_DEPTH:
            return line, f"nested more than {MAX_DEPTH} deep, which no recipe is; close the brackets before it"
    return None


def _plain(node: Node, key: Key, lines: dict[Key, int], problems: list[Problem]) -> Any:
    """Plain Python value of a node; records the line of every key and what only the text shows (duplicate keys)."""
    if isinstance(node, SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            items.append(_plain(item, (*key, index), lines, problems))
        return items
    if isinstance(node, ScalarNode):
        return _scalar(node)
    assert isinstance(node, MappingNode)
    mapping: dict[str, Any] = {}
    for name_node, value_node in node.value:
        line = name_node.start_mark.line + 1
        name = _scalar(name_node) if isinstance(name_node, ScalarNode) else None
        if not isinstance(name, str):
            given = shown(name) if isinstance(name_node, ScalarNode) else "a list or mapping"
            problems.append((line, f"a key in {dotted_key(key)} is {given}; keys are plain words"))
            continue
        if name in mapping:
            first = lines[(*key, name)]
            where = f"the key '{dotted_key((*key, name))}' is given twice, first on line {first}"
            problems.append((line, f"{where}; keep one of them"))
            continue
        lines[(*key, name)] = line
        mapping[name] = _plain(value_node, (*key, name), lines, problems)
    return mapping


def _scalar(node: ScalarNode) -> str | int | float | bool | None:
    """Value of a scalar under the YAML 1.2 core schema; anything else (a date, say) stays text."""
    kind, text = str(node.tag).rpartition(":")[2], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    bare = text.replace("_", "").lower()
    try:
        if kind == "int":
            base = {"0o": 8, "0x": 16, "0b": 2}.get(bare.lstrip("+-")[:2], 10)
            return int(bare, base)
        if kind == "float":
            return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", bare))
    except ValueError:
        pass  # e.g. thousands of digits: left as text, which the schema refuses with the line
    return text


def dotted_key(key: Key) -> str:
    """operations[0].attention_bias.prefix, the way a person would say where a value stands."""
    text = "".join(f"[{part}]" if isinstance(part, int) else "." + _one_line(part) for part in key)
    return text.removeprefix(".") or "the recipe"


def _one_line(text: str) -> str:
    """Text without line breaks or control characters, cut short, so that a sentence stays one printable line."""
    plain = text if text.isprintable() else repr(text)[1:-1]
    return plain if len(plain) <= 40 else plain[:37] + "..."


def shown(value: object) -> str:
    """A value as YAML would show it, cut short."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}".replace(".-", "-.")
    if isinstance(value, (dict, list, tuple)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return f"'{_one_line(value)}'" if isinstance(value, str) else _one_line(repr(value))
