#!/usr/bin/env python3
"""Turn the real English that ships in packages into plain text files for calibration and evaluation.

    extract_text.py wikipedia DUMP.xml.bz2 CALIBRATION.txt EVALUATION.txt
    extract_text.py lee LEE_BACKGROUND.cor LEE.txt CALIBRATION.txt EVALUATION.txt
    extract_text.py docstrings PACKAGE_FOLDER CALIBRATION.txt EVALUATION.txt

Standard library only, so that it runs before anything is installed. Articles (docstrings: modules) go to the two files
in turn, so that they share none; LEE.txt has all. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import html
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

MIN_ARTICLE = 1000  # characters of prose; what is left of a disambiguation page or a stub is shorter
MIN_DOCSTRING = 400  # characters; shorter ones say little in many words
MIN_PARAGRAPH = 40  # characters; shorter lines are captions, labels and what remains of tables
DROPPED = "\x00"  # stands for something that cannot be read aloud (a formula, code): its line is dropped

# Sections that hold references and links instead of prose.
BACK_MATTER = re.compile(
    r"(see also|references?|notes?|footnotes?|citations?|external links?|further reading|bibliography|sources?|"
    r"selected (works|bibliography|publications)|filmography|discography|works( cited)?|publications|"
    r"notes and references|references and notes|gallery|cast)\W*$",
    re.IGNORECASE,
)
UNREADABLE = re.compile(
    r"<(math|code|pre|source|syntaxhighlight|score|chem|hiero)\b[^<>]*?(?<!/)>.*?</\1\s*>", re.DOTALL | re.IGNORECASE
)
SILENT = re.compile(r"<(ref|gallery|timeline|imagemap|table)\b[^<>]*?(?<!/)>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
MEDIA = re.compile(r"(file|image|category|media|[a-z]{2,3}|be-x-old|simple)\s*:", re.IGNORECASE)
HEADING = re.compile(r"^(={1,6})\s*(.*?)\s*=+\s*$")
# Templates that only dress up their first argument, and templates that stand for a character.
WRAPPERS = frozenset("nowrap small smaller nobr sc vanchor angbr nobold resize keypress".split())
SYMBOLS = {"·": "·", "mdashb": "—", "mdash": "—", "ndash": "–", "snd": " – ", "spaced ndash": " – ", "spaces": " ",
           "nbsp": " ", "'s": "'s", "'": "'", "\"'": "\"'", "'\"": "'\"", "!": "|", "=": "="}  # fmt: skip
INNERMOST = {
    "template": re.compile(r"\{\{((?:(?!\{\{|\}\}).)*)\}\}", re.DOTALL),
    "table": re.compile(r"^[ \t:]*\{\|(?:(?!^[ \t:]*\{\|).)*?^[ \t]*\|\}", re.DOTALL | re.MULTILINE),
    "link": re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL),
}


def replace_innermost(text: str, kind: str, replacement: str | Callable[[re.Match[str]], str]) -> str:
    """Replace `kind` of markup from the inside out until none is left, so that nesting needs no parser."""
    while True:
        text, count = INNERMOST[kind].subn(replacement, text)
        if not count:
            return text


def template_text(match: re.Match[str]) -> str:
    """The words a reader would see of a template that stands inside a sentence; nothing for all others."""
    name, *arguments = [part.strip() for part in match[1].split("|")]
    name = name.lower()
    named = {key.strip(): value.strip() for key, found, value in (a.partition("=") for a in arguments) if found}
    plain = [argument for argument in arguments if not re.match(r"\s*[\w-]+\s*=", argument)]
    if name in ("convert", "cvt") and len(plain) >= 2:
        if plain[1] in ("-", "to", "–", "and") and len(plain) >= 4:
            return f"{plain[0]} {'to' if plain[1] != 'and' else 'and'} {plain[2]} {unit(plain[3])}"
        return f"{plain[0]} {unit(plain[1])}"
    if name in ("lang", "transl", "script") and plain:
        return plain[-1]
    if name.startswith("lang-") and plain:
        return plain[0]
    if name in WRAPPERS and plain:
        return plain[-1] if name == "resize" else plain[0]
    if name in ("quote", "cquote", "quotation", "blockquote"):
        return "\n" + (named.get("text") or (plain[0] if plain else "")) + "\n"
    if name in ("nihongo", "tooltip", "abbr", "uss", "inflation", "flag", "val", "nts", "vr", "formatnum") and plain:
        return {"uss": "USS ", "inflation": DROPPED}.get(name, "") + plain[0]
    if name.startswith("formatnum:"):
        return name.partition(":")[2]
    if name in ("as of", "asof") and plain:
        return "As of " + plain[0]
    if name in ("circa", "c.", "ca") and plain:
        return "c. " + plain[0]
    if name in ("chem", "simplenuclide2", "eqm", "e", "frac", "sup", "sub", "su", "ipa", "railgauge", "sqrt"):
        return DROPPED
    return SYMBOLS.get(name, "")


def unit(symbol: str) -> str:
    """A unit as written in a sentence: the template's short forms that are not readable as they stand."""
    return {"sqmi": "square miles", "sqkm": "square kilometres", "km2": "square kilometres", "mi": "miles",
            "ft": "feet", "in": "inches", "m2": "square metres", "lb": "pounds", "mph": "mph", "acre": "acres",
            "C": "°C", "F": "°F", "impgal": "gallons", "t": "tonnes"}.get(symbol, symbol)  # fmt: skip


def link_text(match: re.Match[str]) -> str:
    """The visible part of an internal link; nothing for pictures, categories and other languages."""
    target, bar, label = match[1].partition("|")
    if MEDIA.match(target.strip()):
        return ""
    return label.rpartition("|")[2] if bar and label else target.lstrip(":").partition("#")[0]


def strip_markup(wikitext: str) -> str:
    """Readable paragraphs of one article, separated by blank lines; section headings stand on lines of their own."""
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.DOTALL)
    text = re.sub(r"<ref\b[^<>]*/>", "", text, flags=re.IGNORECASE)
    text = SILENT.sub("", text)
    text = UNREADABLE.sub(DROPPED, text)
    text = replace_innermost(text, "template", template_text)
    text = replace_innermost(text, "table", "")
    text = replace_innermost(text, "link", link_text)
    text = re.sub(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"https?://\S+", "", text)
    text = re.sub(r"</?(?:br|p|div|li|ul|ol|blockquote|poem|center|hr)\b[^<>]*>", "\n", text, flags=re.IGNORECASE)
    text = re.sub(r"</?[a-zA-Z][^<>]*>|__[A-Z]+__", "", text)
    text = html.unescape(re.sub(r"'{5}|'{3}|'{2}", "", text))
    return "\n\n".join(paragraphs(text))


def paragraphs(text: str) -> Iterator[str]:
    """Lines that read as prose, each heading only if prose follows it; back matter is skipped with its subsections.

    A line that ends in a colon is kept only if what it announces is kept too (not a table, a formula or short items).
    """
    pending: dict[int, str] = {}  # level -> heading still waiting for its first paragraph
    announcing = ""  # a line ending in a colon, waiting for the line after it
    skipping = 0  # level of the back-matter heading we are under, 0 if none
    for raw in text.split("\n"):
        heading = HEADING.match(raw.strip())
        if heading:
            announcing = ""
            level = len(heading[1])
            if skipping and level > skipping:
                continue
            skipping = level if BACK_MATTER.match(heading[2]) else 0
            pending = {at: title for at, title in pending.items() if at < level}
            if not skipping and DROPPED not in heading[2]:
                pending[level] = tidy(heading[2])
            continue
        line = tidy(raw)
        if skipping or not is_prose(raw, line):
            announcing = "" if raw.strip() else announcing
            continue
        if line.endswith(":"):
            announcing = line
            continue
        yield from (pending[level] for level in sorted(pending))
        pending.clear()
        if announcing:
            yield announcing
            announcing = ""
        yield line


def tidy(line: str) -> str:
    """Repair the spacing and brackets that removed markup leaves behind."""
    line = re.sub(r"^[*#:;]+", "", line.strip())
    line = re.sub(r"[\u00a0\u2009\u202f\u200a\t ]+", " ", re.sub("[\u200b\u200e\u200f\ufeff\u00ad]", "", line))
    line = re.sub(r"\(\s*[;,:]+\s*", "(", line)
    line = re.sub(r"\s*[;,:]+\s*\)", ")", line)
    line = re.sub(r"(\s*[;,]){2,}", ",", line)
    line = re.sub(r" ?\(\s*(?:or|and|from|pronounced|lit\.?)?\s*\)|\[\s*\]|\"\s*\"", "", line)
    line = re.sub(r"\s+([,.;:!?)])", r"\1", line)
    return re.sub(r" {2,}", " ", re.sub(r"\(\s+", "(", line)).strip()


def is_prose(raw: str, line: str) -> bool:
    """Whether a tidied line is a sentence or more: long enough, mostly letters, ending as sentences end."""
    if DROPPED in line or len(line) < MIN_PARAGRAPH or re.match(r"\s*[|!{}]", raw):
        return False
    if any(left in line for left in ("[[", "]]", "{{", "}}", "{|", "|}", "||")):
        return False
    letters = sum(character.isalpha() or character == " " for character in line)
    return letters >= 0.8 * len(line) and bool(re.search(r"[.!?:;][\"'”’)]*$", line))


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, prose) of every usable article of a MediaWiki export: no redirects, no disambiguation, no stubs."""
    with bz2.open(dump) as stream:
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            wikitext = page.findtext(".//{*}text") or ""
            title = page.findtext("{*}title") or ""
            in_articles = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
            page.clear()
            listing = title.startswith("List of ") or title.endswith("(disambiguation)")
            if in_articles and not listing and not re.search(r"\{\{\s*disambig|\{\{\s*hndis", wikitext, re.IGNORECASE):
                prose = strip_markup(wikitext)
                if len(prose) >= MIN_ARTICLE:
                    yield title, prose


def documented(package: Path) -> Iterator[str]:
    """The docstrings of each module of a package's folder that has long ones, none of them twice."""
    seen: set[str] = set()
    for path in sorted(package.rglob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # a template of code
            continue
        documents = (ast.AsyncFunctionDef, ast.FunctionDef, ast.ClassDef, ast.Module)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documents)]
        texts = [text for text in dict.fromkeys(texts) if len(text) >= MIN_DOCSTRING and text not in seen]
        seen.update(texts)
        if texts:
            yield "\n\n".join(texts) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 `text` so that `path` never holds a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_halves(parts: list[str], calibration: Path, evaluation: Path) -> None:
    """Every other part into one file, the rest into the other."""
    write_whole(calibration, "\n\n".join(parts[0::2]))
    write_whole(evaluation, "\n\n".join(parts[1::2]))


def arguments() -> argparse.Namespace:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, names in (("wikipedia", ()), ("lee", ("whole",)), ("docstrings", ())):
        command = kinds.add_parser(kind)
        for name in ("source", *names, "calibration", "evaluation"):
            command.add_argument(name, type=Path)
    return parser.parse_args()


def main() -> int:
    """Exit 1 with a sentence when the input holds no usable text."""
    given = arguments()
    if given.kind == "lee":
        parts = [line.strip() + "\n" for line in given.source.read_text(encoding="utf-8").splitlines() if line.strip()]
        write_whole(given.whole, "\n".join(parts))
    elif given.kind == "docstrings":
        parts = list(documented(given.source))
    else:
        parts = [f"{title}\n\n{prose}\n" for title, prose in articles(given.source)]
    if len(parts) < 2:
        print(f"{given.source}: holds fewer than two usable texts; unpack it again from its package.", file=sys.stderr)
        return 1
    write_halves(parts, given.calibration, given.evaluation)
    return 0


if __name__ == "__main__":
    sys.exit(main())
