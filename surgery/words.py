"""Numbers, names and lists as people read them; what gates, terminal, model card and report write alike."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

WIDTH = 112  # of lines of a model card
NONE = "–"  # what was not measured
COLLAPSE = math.log(10)  # nats: a change that multiplies perplexity by ten or more is called a collapse
LITTLE = math.log(1.01)  # nats: one whose whole interval is within this changes perplexity by less than 1%
LITTLE_CHANGE, UNKNOWN = "less than 1%", "too few chunks to tell"
MOST = 700.0  # of what exp is taken of: a float holds no more

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TO = "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}"


class Called(NamedTuple):
    """What an encoder reads, and what of it becomes a token, in words: one, and several; and what may become slots."""

    one: str
    many: str
    part: str
    parts: str
    register: str = "register"

    @property
    def registers(self) -> str:
        return self.register if self.register.isupper() else f"{self.register}s"


IMAGE = Called("image", "images", "patch", "patches")
RECORDING = Called("recording", "recordings", "frame", "frames")
WRITTEN = Called("text", "texts", "token", "tokens", "BOS")
SPECTROGRAM = Called("recording", "recordings", "patch", "patches")  # whose picture is cut as an image is


# ---- numbers


def finite(value: float | None) -> TypeGuard[float]:
    """Whether `value` is a number that can be plotted (not None, NaN or infinite)."""
    return value is not None and math.isfinite(value)


def human(size: int) -> str:
    """Bytes as a person reads them: 1536 -> "1.5 kB" (powers of 1000)."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def factor(difference: float | None) -> float:
    """exp of a mean NLL, or of a difference of two (then a ratio); infinite beyond floats, NaN where there is none."""
    if difference is None:
        return math.nan
    return math.inf if difference >= MOST else math.exp(difference)


def number(value: float | None, digits: int = 4) -> str:
    """25439.2 -> 25,439; 21.2644 -> 21.26; 1.3e7 -> 1.3×10⁷; None and NaN -> –; a true minus sign."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and not 1e-4 <= size < 1e7:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
        text = power if mantissa == "1" else f"{mantissa}×{power}"
    elif size >= 1000 or float(size).is_integer():
        text = f"{size:,.0f}"
    else:
        text = f"{size:.{digits}g}"
    return f"−{text}" if value < 0 else text


def rounded(value: float) -> str:
    """A large count in three digits and a word: 134,515,008 -> 135 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return number(value)


def fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals, where it is small enough for them to matter."""
    return f"{value:.{decimals}f}" if value is not None and math.isfinite(value) and value < 1000 else number(value)


def score(ppl: float | None) -> str:
    """A perplexity: two decimals where it is small, so that 20 and 20.003 do not look alike."""
    return fixed(ppl, 2)


def signed(value: float | None, digits: int = 3) -> str:
    """A difference, with its sign."""
    return f"+{number(value, digits)}" if value is not None and value > 0 else number(value, digits)


def interval(delta: Mapping[str, Any]) -> str:
    """`mean` (`low` to `high`) of a difference, with the decimals that its interval allows, at most four."""
    mean, low, high = (delta.get(key) for key in ("mean", "low", "high"))
    if not (finite(mean) and finite(low) and finite(high)):
        return signed(mean)
    decimals = _decimals(high - low)
    # What rounds to zero has no sign of its own.
    mean, low, high = (f"{round(value, decimals) + 0.0:+.{decimals}f}".replace("-", "−") for value in (mean, low, high))
    return f"{mean} ({low}{_TO}{high})"


def times(delta: Mapping[str, Any] | None) -> str:
    """2.48 (2.35 to 2.63): exp of a difference in NLL, with its interval and the decimals that this allows."""
    mean, low, high = (factor((delta or {}).get(key)) for key in ("mean", "low", "high"))
    if not (finite(mean) and finite(low) and finite(high)):
        return number(mean)
    decimals = _decimals(high - low)
    shown = [number(value, 3) if value >= 100 else f"{value:.{decimals}f}" for value in (mean, low, high)]
    return f"{shown[0]} ({shown[1]}{_TO}{shown[2]})"


def _decimals(width: float) -> int:
    """Two to four: so many that half of an interval's width has two digits."""
    return min(max(1 - math.floor(math.log10(max(width, 1e-9) / 2)), 2), 4)


def reached(judgement: Mapping[str, Any]) -> str:
    """The value of one of the `gates` of a verdict, with digits enough that what is just beyond a limit shows."""
    value = judgement["value"]
    return "nan" if math.isnan(value) else number(value, 6)


def asked(judgement: Mapping[str, Any]) -> str:
    """What a gate asks for: "at most 1.01"."""
    return f"{'at least' if judgement.get('minimum') else 'at most'} {number(judgement['limit'], 6)}"


def encoded(survey: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`images`, `audio` or `text` of an encoder's survey: what tokens one becomes; None of a language model's."""
    return survey.get("images") or survey.get("audio") or survey.get("text")


def called(found: Mapping[str, Any]) -> Called:
    """What was read, by a survey of an encoder or by an entry of a verdict that counts `images`, `recordings` or
    `texts`."""
    if found.get("text") or "texts" in found:
        return WRITTEN
    if not found.get("audio") and "recordings" not in found:
        return IMAGE
    return SPECTROGRAM if "grid" in (found.get("audio") or ()) or "patches" in found else RECORDING


def tokens_of(read: Mapping[str, Any], times: str = "×") -> str:
    """`images`, `audio` or `text` of a survey: what tokens one becomes."""
    special, registers = read["special"], read["registers"]
    if "tokens" in read:
        named = ["BOS"] * (registers == 1) or [f"{registers} tokens in front"] * bool(registers)
        named += ["CLS"] if special > registers else []
        return listing([*named, count_of(read["tokens"], "token")])
    named = ["CLS"] if special else []
    named += [count_of(registers, "register")] if registers else []
    named += [count_of(special - registers - 1, "special token")] if special > registers + 1 else []
    if "frames" in read:
        named = [] if not special else [count_of(special, "register")]  # of test time: sound has no CLS
        return listing([*named, count_of(read["frames"], "frame")])
    rows, columns = read["grid"]
    return listing([*named, f"{rows} {times} {columns} patches"])


def whole_of(interventions: Sequence[Mapping[str, Any]]) -> str:
    """What stands for all of what an encoder reads, by what interventions on it say of fidelity."""
    return "last token" if any("last" in (row.get("fidelity") or ()) for row in interventions) else "CLS"


def percent(share: float | None) -> str:
    """0.993 -> 99.3%; what is not all is never rounded to 100%."""
    if share is None or not math.isfinite(share):
        return NONE
    shown = f"{100 * share:.1f}" if share < 0.9995 or share >= 1 else f"{math.floor(100_000 * share) / 1000:.3f}"
    return f"{shown.removesuffix('.0')}%"


def change(delta: Mapping[str, Any] | None) -> str:
    """What became of perplexity, judged on the paired 95% interval of its NLL difference.

    An interval that holds zero is no proof that nothing happened: only a narrow one is called little change.
    """
    mean, low, high = ((delta or {}).get(key) for key in ("mean", "low", "high"))
    if mean is None or math.isnan(mean):
        return NONE
    if mean == math.inf:
        return "collapse"
    if not (finite(low) and finite(high)):
        return UNKNOWN
    if -LITTLE <= low and high <= LITTLE:
        return LITTLE_CHANGE
    if low <= 0 <= high:
        return UNKNOWN
    if mean >= COLLAPSE:
        return f"collapse, ×{number(factor(mean), 3)}" if mean < MOST else "collapse"
    return f"{'worse' if mean > 0 else 'better'}, {signed(100 * math.expm1(mean))}%"


def compared(delta: Mapping[str, Any] | None) -> str:
    """The same, as what is said of one model beside another: it is ..."""
    said = change(delta)
    return {LITTLE_CHANGE: f"{LITTLE_CHANGE} away", UNKNOWN: "not measurably different"}.get(said, said)


# ---- names and lists


def shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


def visible(token: object, room: int = 24) -> str:
    """A token's text, cut to `room` characters; white space and controls can be seen: `⏎`, `␣the`, `\\u0000`."""
    text = str(token).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return shortened(visible_name(text), room) or "∅"


def visible_name(name: str) -> str:
    """A path or an id as it may stand on a page: without control characters and half characters."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in name)


def named(name: object, room: int = 80) -> str:
    """A name from a stranger's file as it may stand in a message: cut to `room` characters, controls visible."""
    return visible_name(shortened(str(name), room))


def visible_text(text: str) -> str:
    """Several lines of text as they may stand on a page: lines stay, other controls and half characters are shown."""
    return "\n".join(visible_name(line) for line in text.split("\n"))


def quoted(tokens: Sequence[object], most: int = 5) -> str:
    """“␣the” and “⏎”."""
    return listing([f"“{visible(token)}”" for token in tokens], most)


def listing(things: Sequence[object], most: int = 5) -> str:
    """a, b and c; or a, b, c and 12 more."""
    shown = [str(thing) for thing in things[:most]]
    if len(things) > most:
        return f"{', '.join(shown)} and {len(things) - most:,} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 9] -> "3–5, 9"."""
    spans: list[list[int]] = []
    for at in sorted(numbers):
        if spans and at == spans[-1][1] + 1:
            spans[-1][1] = at
        else:
            spans.append([at, at])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in spans) or NONE


def count_of(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def wrapped(text: str) -> str:
    """A paragraph in lines of `WIDTH`."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
