"""Kinds of field that recipes are made of."""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    create_model,
    model_validator,
)

from .strict_yaml import shown


def _token(value: object) -> str | int:
    """A prefix entry: the text of one token, or its id (>= 0). ValueError otherwise."""
    if isinstance(value, str) and value:
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("holds half of a character pair, which is not text; write the whole character")
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f'is {shown(value)}; write the text of one token in quotes, such as "\\n", or its id, 0 or more')


@dataclass(frozen=True)
class Or:
    """On a field that is a word or a list: what else than the word it may be."""

    alternative: str


def _kind(word: str, listed: str) -> Callable[[object], str]:
    """For a setting that is one word or a list: which of the two a value is meant as."""
    return lambda value: listed if isinstance(value, (list, tuple)) else word


def _this_format(value: object) -> object:
    if type(value) is not int or value != 1:  # 1.0 and true equal 1 in Python, and a Literal would let them pass
        raise ValueError(f"is {shown(value)}, and the only recipe format is 1; write 'surgery: 1'")
    return value


Format = Annotated[Literal[1], BeforeValidator(_this_format), Field(description="the version of this format, 1")]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Tokens = Annotated[tuple[Annotated[str | int, PlainValidator(_token)], ...], AsTuple, Field(min_length=1)]
Prefix = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[Tokens, Tag("tokens")],
    Discriminator(_kind("auto", "tokens")),
    Or("a list of tokens"),
]
Numbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AsTuple, Field(min_length=1)]
Layers = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[Numbers, Tag("numbers")],
    Discriminator(_kind("all", "numbers")),
    Or("a list of numbers"),
]
AutoOr = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[int, Field(ge=1), Tag("number")],
    Discriminator(lambda value: "number" if isinstance(value, int) and not isinstance(value, bool) else "auto"),
    Or("a whole number"),
]
Targets = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[tuple[str, ...], AsTuple, Field(min_length=1), Tag("names")],
    Discriminator(_kind("all", "names")),
    Or("a list of names"),
]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """A mapping of a recipe: unknown keys and wrong types are errors, and what was read stays as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Named(Strict):
    """Settings that stand under a name of their own. A key without a default has `Field(examples=[...])`.

    `told_by`: where several kinds have the same name, the key that says it is this one; None of the one that is meant
    where no such key is there.
    """

    name: ClassVar[str]
    told_by: ClassVar[str | None] = None


class OneOf(Strict):
    """A mapping with exactly one key, which names what is chosen; see `one_of`."""

    noun: ClassVar[str]
    shown: ClassVar[str]

    @property
    def chosen(self) -> Named:
        return next(value for name in type(self).model_fields if (value := getattr(self, name)) is not None)

    @model_validator(mode="before")
    @classmethod
    def _one_known_name(cls, value: object) -> object:
        if isinstance(value, Named):
            return {value.name: value}
        if not isinstance(value, dict):
            raise ValueError(f"is {shown(value)}; write '- {cls.shown}'")
        for name in value:
            if name not in cls.model_fields:
                raise ValueError(f"names the unknown {cls.noun} {shown(name)}; {known(str(name), cls)}")
        if len(value) != 1:
            many = f"holds several {cls.noun}s; give each an entry of its own, with its own dash"
            raise ValueError(many if value else f"holds no {cls.noun}; write '- {cls.shown}'")
        return value


def one_of(kinds: Sequence[type[Named]], noun: str, example: str) -> Any:
    """The annotation of a field that is any of `kinds`, written as a mapping from its name to its settings.

    `example`: one of them, as a recipe writes it.
    """
    fields: dict[str, Any] = {kind.name: (_kinds_called(kind.name, kinds), None) for kind in kinds}
    model = create_model(noun.capitalize(), __base__=OneOf, **fields)
    model.noun, model.shown = noun, example
    return Annotated[
        model,
        AfterValidator(lambda entry: entry.chosen),
        PlainSerializer(lambda chosen: {chosen.name: chosen.model_dump(mode="json", exclude_none=True, by_alias=True)}),
    ]


def _kinds_called(name: str, kinds: Sequence[type[Named]]) -> Any:
    """The annotation of settings under `name`: of the one kind that is called so, or of whichever a key tells."""
    found = {kind.told_by or "": kind for kind in kinds if kind.name == name}
    if len(found) == 1:
        return next(iter(found.values()))

    def told(value: object) -> str:
        if isinstance(value, Named):
            return value.told_by or ""
        return next((key for key in found if key and isinstance(value, dict) and key in value), "")

    tagged = [Annotated[kind, Tag(key)] for key, kind in found.items()]
    return Annotated[functools.reduce(operator.or_, tagged), Discriminator(told)]  # type: ignore[arg-type]


def known(name: str, model: type[BaseModel]) -> str:
    """The way out for an unknown name: the nearest that exists, and all that do."""
    names = list(model.model_fields)
    near = difflib.get_close_matches(name, names, n=1)
    listed = "known here: " + ", ".join(names)
    return f"did you mean '{near[0]}'? ({listed})" if near else listed
