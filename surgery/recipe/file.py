"""Recipes in files: reading them, and saying in one sentence what is wrong with one, by line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import RecipeError
from .fields import Strict, known
from .gates import (
    CacheEdits,
    Equivalence,
    Int8Gate,
    MassiveActivations,
    Perplexity,
    Quantised,
    QuantisedGate,
    Streaming,
    Tasks,
    Verify,
)
from .operations import AttentionBias, HeadNorm, Smoothing
from .pretrain import FromScratch, Pretrain, Size
from .recipe import Recipe
from .strict_yaml import MAX_BYTES, Key, dotted_key, read_yaml, shown
from .tune import Dataset, Lora, Objectives, Tune

R = TypeVar("R", Recipe, FromScratch)

_MODELS: dict[str, type[Strict]] = {
    "attention_bias": AttentionBias,
    "smoothing": Smoothing,
    "head_norm": HeadNorm,
    "tune": Tune,
    "objectives": Objectives,
    "lora": Lora,
    "dataset": Dataset,
    "pretrain": Pretrain,
    "model": Size,
    "verify": Verify,
    "equivalence": Equivalence,
    "perplexity": Perplexity,
    "massive_activations": MassiveActivations,
    "quantised": Quantised,
    "streaming": Streaming,
    "cache_edits": CacheEdits,
    "tasks": Tasks,
    **dict.fromkeys(Quantised.model_fields, QuantisedGate),
    **dict.fromkeys(("w8a8_static", "w8a8_dynamic", "w8a8_per_token"), Int8Gate),
}

# Keys that have no default, and a value for each.
_NEEDED = {
    "surgery": "1",
    "operations": "[attention_bias: {prefix: auto}]",
    "pretrain": "{steps: 1000}",
    "max_ratio": "1.25",
    "window": "256",
    "tokens": "64",
    "names": "[arc_easy]",
    "max_drop": "0.02",
    "limit": "500",
    "steps": "300",
    "name": "allenai/c4",
    "patience": "3",
}

# Top keys that only one of the commands reads.
_COMMANDS = {**dict.fromkeys(("operations", "tune", "verify"), "surgery run"), "pretrain": "surgery pretrain"}


def load_recipe(path: Path, schema: type[R] = Recipe) -> R:
    """Read the recipe in the file `path`. RecipeError when it cannot be read or does not say something we can do."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; give the path of a recipe, such as recipes/eab.yaml.") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe file.") from error
    except UnicodeDecodeError as error:
        if len(raw) <= MAX_BYTES:
            line = raw[: error.start].count(b"\n") + 1
            raise RecipeError(f"{path}, line {line}: not UTF-8 text; save the recipe as UTF-8.") from error
        text = " " * len(raw)  # cut in the middle of a character: too long is the complaint to make
    return parse_recipe(text, str(path), schema)


def parse_recipe(text: str, name: str, schema: type[R] = Recipe) -> R:
    """Parse recipe `text` by `schema`; `name` stands for the file in messages.

    RecipeError names the first error of the file and counts the further ones.
    """
    value, lines, problems = read_yaml(text, name)
    for key, command in _COMMANDS.items():
        if isinstance(value, dict) and key in value and key not in schema.model_fields:
            raise RecipeError(f"{name}, line {lines[key,]}: '{key}' is what {command} reads; give the recipe to that.")
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
        raise RecipeError(f"{name}, line {line}: {sentence}{more}.")
    return recipe


def _problem(detail: dict[str, Any], lines: dict[Key, int], schema: type[Strict]) -> tuple[int, str]:
    """(line, sentence) for one pydantic error; the line is that of the nearest key that stands in the file."""
    key: Key = ()
    for part in detail["loc"]:
        if (*key, part) in lines:
            key = (*key, part)
    line, given, context = lines[key], detail["input"], detail.get("ctx", {})
    dotted, kind = dotted_key(key), detail["type"]
    if kind == "extra_forbidden":
        return line, f"unknown key '{dotted}'; {known(str(key[-1]), _holder(key, schema))}"
    if kind == "missing":
        lacking = detail["loc"][-1]
        return line, f"the key '{lacking}' is missing; add '{lacking}: {_NEEDED[lacking]}'"
    if kind == "value_error":
        return line, f"{dotted} {context['error']}"
    value = f"{dotted} is {shown(given)}"
    if kind == "literal_error":
        alternative = {"prefix": ", or a list of tokens", "layers": ", or a list of numbers"}.get(str(key[-1]), "")
        return line, f"{value}; it must be {context['expected']}{alternative}"
    if kind in ("float_type", "finite_number"):
        return line, f"{value}: a gate that is not a number; write one such as {_example(key, schema)}"
    if kind in ("string_type", "string_too_short"):
        return line, f"{value}; it must be text"
    if kind == "bool_type":
        return line, f"{value}; it must be true or false"
    if kind == "int_type":
        return line, f"{value}, which is not a whole number; write one such as {_example(key, schema)}"
    if kind.startswith(("greater_than", "less_than")):
        bound = {"gt": "more than", "ge": "at least", "le": "at most"}
        return line, f"{value}; it must be " + " ".join(f"{bound[name]} {limit:g}" for name, limit in context.items())
    if kind == "too_short":
        return line, f"{dotted} is an empty list; it needs at least one entry"
    if kind == "tuple_type":
        return line, f"{value}; it must be a list"
    model = _MODELS[str(key[-1])] if key else schema
    return line, f"{value}; it must be a mapping of " + ", ".join(model.model_fields)


def _holder(key: Key, schema: type[Strict]) -> type[Strict]:
    """The model that `key` stands in, as far as it has a name."""
    return next((_MODELS[part] for part in reversed(key[:-1]) if part in _MODELS), schema)


def _example(key: Key, schema: type[Strict]) -> str:
    """The default of a numeric key, as a person would write it, or what could be written where there is none."""
    if isinstance(key[-1], int):
        return "0"  # an entry of a list
    if key[-1] in _NEEDED:
        return _NEEDED[str(key[-1])]
    return f"{_holder(key, schema).model_fields[str(key[-1])].default:g}".replace("1e-05", "1.0e-5")
