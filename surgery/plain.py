"""Text from strangers, as a terminal may have it."""

from __future__ import annotations

import json
import unicodedata

# Controls, marks that turn the direction of writing, halves of characters, separators of lines: a terminal would obey.
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def shown(text: str) -> str:
    """`text` with every character escaped that a terminal would obey instead of showing it (newline, ESC, RLO)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _OBEYED else c for c in text)


def shown_json(text: str) -> str:
    """JSON `text` with such characters as escapes of JSON; line breaks between values stay."""
    if text.isascii():
        return text
    return "".join(json.dumps(c)[1:-1] if c != "\n" and unicodedata.category(c) in _OBEYED else c for c in text)


def cut(text: str, most: int) -> str:
    """`text`, its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
