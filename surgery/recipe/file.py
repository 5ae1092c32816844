"""Recipes in files: reading them, and saying in one sentence what is wrong with one, by line and key.

Nothing here knows a key by name: what a key may be, and an example of it, is read from the schema.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ..checkpoint.regular import open_regular
from ..errors import RecipeError, brief
from .builtin import recipe_file
from .fields import Format, Or, Strict, known
from .strict_yaml import MAX_BYTES, Key, dotted_key, read_yaml, shown


class Document(Strict):
    """The top of a recipe. `elsewhere`: keys that only another command reads, and that command."""

    elsewhere: ClassVar[dict[str, str]] = {}

    surgery: Annotated[Format, Field(examples=[1], description="the version of this format")]


D = TypeVar("D", bound=Document)


def read(given: object, schema: type[D]) -> D:
    """The recipe `given`: by itself, or as a mapping of its keys, a Path, or a text as `recipe_file` takes it."""
    if isinstance(given, schema):
        return given
    if isinstance(given, Mapping):
        return from_mapping(given, schema)
    if isinstance(given, (str, os.PathLike)):
        return load(recipe_file(given if isinstance(given, str) else Path(given)), schema)
    raise RecipeError(f"a recipe is a name, a path or a dict, and not of type {type(given).__name__}; give such a one.")


def from_mapping(given: Mapping[str, Any], schema: type[D]) -> D:
    """The recipe with these keys and values, which are checked as those of a file are."""
    try:
        text = json.dumps(given if isinstance(given, dict) else dict(given), ensure_ascii=False)  # is YAML too
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"the recipe holds what no YAML can ({brief(error)}); use dicts, lists, text and numbers."
        ) from error
    return parse(text, "the recipe", schema, lined=False)


def load(path: Path, schema: type[D]) -> D:
    """Read the recipe in the file `path`. RecipeError when it cannot be read or does not say something we can do."""
    path = Path(path)
    try:
        with open_regular(path) as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such file; give the path of a recipe, or the name of one: surgery recipes."
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe file.") from error
    except UnicodeDecodeError as error:
        if len(raw) <= MAX_BYTES:
            line = raw[: error.start].count(b"\n") + 1
            raise RecipeError(f"{path}, line {line}: not UTF-8 text; save the recipe as UTF-8.") from error
        text = " " * len(raw)  # cut in the middle of a character: too long is the complaint to make
    return parse(text, str(path), schema)


def parse(text: str, name: str, schema: type[D], *, lined: bool = True) -> D:
    """Parse recipe `text` by `schema`; `name` stands for the file in messages.

    RecipeError names the first error of the file and counts the further ones; its line too, unless the text has none
    that a person knows.
    """
    value, lines, problems = read_yaml(text, name)

    def place(line: int) -> str:
        return f"{name}, line {line}" if lined else name

    for key, command in schema.elsewhere.items():
        if isinstance(value, dict) and key in value:
            raise RecipeError(f"{place(lines[key,])}: '{key}' is what {command} reads; give the recipe to that.")
    recipe = None
    try:
        recipe = schema.model_validate(value)
    except ValidationError as error:
        # What is missing comes last: next to a misspelt key on the same line, the misspelling is the news.
        details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] == "missing")
        problems += [_problem(detail, lines, schema) for detail in details]
    if problems or recipe is None:
        line, sentence = min(problems, key=lambda problem: problem[0])
        more = {1: "", 2: " (and 1 further error)"}.get(len(problems), f" (and {len(problems) - 1} further errors)")
        raise RecipeError(f"{place(line)}: {sentence}{more}.")
    return recipe


def _problem(detail: ErrorDetails, lines: dict[Key, int], schema: type[Strict]) -> tuple[int, str]:
    """(line, sentence) for one pydantic error; the line is that of the nearest key that stands in the file."""
    key: Key = ()
    for part in detail["loc"]:
        if (*key, part) in lines:
            key = (*key, part)
    return lines[key], _sentence(detail, key, schema)


def _sentence(detail: ErrorDetails, key: Key, schema: type[Strict]) -> str:
    context, kind, dotted = detail.get("ctx", {}), detail["type"], dotted_key(key)
    value, holder = f"{dotted} is {shown(detail['input'])}", model_at(schema, key[:-1])
    if kind == "extra_forbidden":
        return f"unknown key '{dotted}'; {known(str(key[-1]), holder)}"
    if kind == "missing":
        lacking = detail["loc"][-1]
        return f"the key '{lacking}' is missing; add '{lacking}: {_example(model_at(schema, key), lacking)}'"
    if kind == "value_error":
        return f"{dotted} {context['error']}"
    if kind == "literal_error":
        return f"{value}; it must be {context['expected']}{_alternative(holder, key[-1])}"
    if kind in ("float_type", "finite_number"):
        return f"{value}: a gate that is not a number; write one such as {_example(holder, key[-1])}"
    if kind in ("string_type", "string_too_short"):
        return f"{value}; it must be text"
    if kind == "bool_type":
        return f"{value}; it must be true or false"
    if kind == "int_type":
        return f"{value}, which is not a whole number; write one such as {_example(holder, key[-1])}"
    if kind.startswith(("greater_than", "less_than")):
        bound = {"gt": "more than", "ge": "at least", "le": "at most"}
        return f"{value}; it must be " + " ".join(f"{bound[name]} {limit:g}" for name, limit in context.items())
    if kind == "multiple_of":
        return f"{value}; it must be a multiple of {context['multiple_of']}"
    if kind == "too_short":
        return f"{dotted} is an empty list; it needs at least one entry"
    if kind == "tuple_type":
        return f"{value}; it must be a list"
    return f"{value}; it must be a mapping of " + ", ".join(model_at(schema, key).model_fields)


# ---- what a schema says of a key


def model_at(schema: type[BaseModel], key: Key) -> type[BaseModel]:
    """The model of the mapping at `key`; where there is no mapping, of the nearest one that holds the key."""
    for part, below in zip(key, (*key, None)[1:], strict=True):
        field = field_of(schema, part) if isinstance(part, str) else None
        models = [] if field is None else _models_in(field.annotation)
        schema = next((one for one in models if field_of(one, below) is not None), next(iter(models), schema))
    return schema


def field_of(model: type[BaseModel], key: object) -> FieldInfo | None:
    """The field that a recipe calls `key`."""
    return next((field for name, field in model.model_fields.items() if key == (field.alias or name)), None)


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _alternative(holder: type[BaseModel], name: str | int) -> str:
    field = field_of(holder, name) or FieldInfo()
    return next((f", or {mark.alternative}" for mark in field.metadata if isinstance(mark, Or)), "")


def _example(holder: type[BaseModel], name: str | int) -> str:
    """The default of a key, or what could be written where there is none."""
    if isinstance(name, int):
        return "0"  # an entry of a list
    field = field_of(holder, name) or FieldInfo()
    return written(field.examples[0] if field.examples else field.default)


def written(value: object) -> str:
    """A value of JSON as a person would write it in YAML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        # A mapping within a list needs no braces.
        items = (written(item)[1:-1] if isinstance(item, dict) else written(item) for item in value)
        return f"[{', '.join(items)}]"
    if isinstance(value, float):
        return f"{value:g}".replace("1e-05", "1.0e-5")
    if isinstance(value, str) and value.replace("_", "").replace("/", "").isalnum():
        return value
    return json.dumps(value, ensure_ascii=False)
