"""Kinds of field that recipes are made of."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PlainValidator, Tag

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


def _kind(word: str, listed: str) -> Callable[[object], str]:
    """For a setting that is one word or a list: which of the two a value is meant as."""
    return lambda value: listed if isinstance(value, (list, tuple)) else word


def _this_format(value: object) -> object:
    if type(value) is not int or value != 1:  # 1.0 and true equal 1 in Python, and a Literal would let them pass
        raise ValueError(f"is {shown(value)}, and the only recipe format is 1; write 'surgery: 1'")
    return value


Format = Annotated[Literal[1], BeforeValidator(_this_format)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Tokens = Annotated[tuple[Annotated[str | int, PlainValidator(_token)], ...], AsTuple, Field(min_length=1)]
Prefix = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[Tokens, Tag("tokens")], Discriminator(_kind("auto", "tokens"))
]
Numbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AsTuple, Field(min_length=1)]
Layers = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[Numbers, Tag("numbers")], Discriminator(_kind("all", "numbers"))
]
Targets = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[tuple[str, ...], AsTuple, Field(min_length=1), Tag("names")],
    Discriminator(_kind("all", "names")),
]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Gate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def known(name: str, model: type[Strict]) -> str:
    """The way out for an unknown name: the nearest that exists, and all that do."""
    names = list(model.model_fields)
    near = difflib.get_close_matches(name, names, n=1)
    listed = "known here: " + ", ".join(names)
    return f"did you mean '{near[0]}'? ({listed})" if near else listed
