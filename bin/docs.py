#!/usr/bin/env python3
"""Write the tables of a recipe's keys: operations and gates in README.md, all other keys in recipes/README.md.

    bin/docs.py [--check]

What stands there comes from the schema: the first sentence of a class's docstring, and of each key its default, the
values it may have and its `Field(description=...)`. With --check nothing is written: exit 1 if a file says otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from marked import update
from pydantic import BaseModel
from ruamel.yaml import YAML

from surgery.operations import OPERATIONS
from surgery.operations.base import Operation
from surgery.steps.recipe import Recipe
from surgery.tuning.scratch.settings import FromScratch
from surgery.verification.gates import GATES, Gate

EXACT = {"bits": "to the bit", "rounding": "to rounding", "no": "no"}
Schema = dict[str, Any]  # a JSON schema, or a part of one


@dataclass(frozen=True)
class Key:
    """One key of a mapping in a recipe, as it is written about; `mapping` is the schema of what stands below it."""

    name: str
    default: str
    values: str
    meaning: str
    mapping: Schema | None


# ---- reading the schema


def first_sentence(text: str | None) -> str:
    """Of the first paragraph of a docstring, in one line."""
    paragraph = " ".join((text or "").strip().partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".")


def keys(schema: Schema, defs: Schema, where: str) -> list[Key]:
    """The keys of a mapping. Exits where one has no description: a key that nobody explains is not finished."""
    found = []
    for name, part in schema["properties"].items():
        mapping = referred(part, defs)
        meaning = part.get("description") or first_sentence((mapping or {}).get("description"))
        if not meaning:
            sys.exit(f"{where}.{name} has no description; give its Field one")
        required = name in schema.get("required", ())
        default = "required" if required else "its defaults" if mapping and part["default"] else plain(part["default"])
        found.append(Key(name, default, values(part, defs), meaning, mapping))
    return found


def referred(part: Schema, defs: Schema) -> Schema | None:
    """The schema of the mapping that `part` is or may be."""
    for candidate in (part, *part.get("anyOf", ())):
        if "$ref" in candidate:
            found: Schema = defs[candidate["$ref"].rpartition("/")[2]]
            return found
    return None


def plain(value: Any) -> str:
    """A default as a recipe says it."""
    if value is None:
        return "left out"
    if isinstance(value, float) and 0 < abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"`{mantissa}e{int(exponent)}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def values(part: Schema, defs: Schema) -> str:
    """What a key may be set to, in words."""
    kind = part.get("type")
    if choices := [*part.get("anyOf", ()), *part.get("oneOf", ())]:
        return " or ".join(values(choice, defs) for choice in choices if choice.get("type") != "null")
    if "$ref" in part or kind == "object":
        return "a mapping"
    if "const" in part:
        return plain(part["const"])
    if "enum" in part:
        return " or ".join(map(plain, part["enum"]))
    if kind == "array":
        return f"a list of {values(part['items'], defs)}" if part["items"] else "a list"
    words = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "string": "text"}[str(kind)]
    return " ".join([words, *bounds(part)])


def bounds(part: Schema) -> Iterator[str]:
    low, high = part.get("minimum"), part.get("maximum")
    if "exclusiveMinimum" in part:
        yield f"above {part['exclusiveMinimum']:g}" + ("" if high is None else f", at most {high:g}")
    elif low is not None:
        yield f"from {low:g}" + ("" if high is None else f" to {high:g}")


# ---- writing


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def key_cell(schema: Schema, defs: Schema, where: str) -> str:
    """All keys of an operation or gate in one cell of a table; neighbours that are alike are told together."""
    lines: list[str] = []
    known: list[Key] = keys(schema, defs, where)
    while known:
        alike = [key for key in known if key.mapping is not None and key.mapping is known[0].mapping] or known[:1]
        names, first = ", ".join(f"`{key.name}`" for key in alike), alike[0]
        if first.mapping is None:
            lines.append(f"{names} ({first.default}): {first.meaning}")
        else:
            below = "; ".join(f"`{k.name}` ({k.default}) {k.meaning}" for k in keys(first.mapping, defs, where))
            lines.append(f"{names} ({first.default}): {below}")
        known = [key for key in known if key not in alike]
    return "<br>".join(lines)


def row(kind: type[BaseModel], name: str, last: str) -> list[str]:
    schema = kind.model_json_schema()
    return [f"`{name}`", first_sentence(kind.__doc__), key_cell(schema, schema.get("$defs", {}), kind.__name__), last]


def exactness(kind: type[Operation]) -> str:
    return EXACT[kind.model_validate(YAML(typ="safe").load(kind.example)).exact]


def applies(kind: type[Gate]) -> str:
    if not kind.always:
        return "where a recipe names it"
    return "where the recipe is exact" if kind.same_function else "always"


def sections(schema: Schema, defs: Schema, where: str) -> Iterator[str]:
    """A table for the mapping `where`, and one for each mapping below it."""
    found = keys(schema, defs, where)
    yield f"### {where}\n\n{first_sentence(schema['description'])}."
    yield table(
        ("key", "default", "values", "meaning"),
        [(f"`{key.name}`", key.default, key.values, key.meaning) for key in found],
    )
    for key in found:
        if key.mapping is not None:
            yield from sections(key.mapping, defs, f"{where}.{key.name}")


def other_keys() -> str:
    """Every key of recipes but those of operations and gates."""
    parts: list[str] = []
    for schema, title in (
        (Recipe.model_json_schema(), "surgery run"),
        (FromScratch.model_json_schema(), "surgery pretrain"),
    ):
        defs = schema.pop("$defs")
        rows = [(f"`{key.name}`", key.default, key.meaning) for key in keys(schema, defs, title)]
        parts += [f"## For {title}", table(("key", "default", "meaning"), rows)]
        for name in ("tune", "pretrain"):
            if name in schema["properties"]:
                mapping = referred(schema["properties"][name], defs)
                assert mapping is not None
                parts += sections(mapping, defs, name)
    return "\n\n".join(parts)


def main(arguments: list[str]) -> int:
    operations = table(
        ("operation", "what it does", "keys (default)", "exact by default"),
        [row(kind, kind.name, exactness(kind)) for kind in OPERATIONS],
    )
    gates = table(
        ("gate", "what is judged", "keys (default)", "applies"),
        [row(kind, kind.name, applies(kind)) for kind in GATES],
    )
    parts = (
        ("README.md", "operations", operations),
        ("README.md", "gates", gates),
        ("recipes/README.md", "keys", other_keys()),
    )
    return update("bin/docs.py", parts, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
