"""Every edit of `helpers.tampering` against every way to verify, with the manifest's hashes as they were and anew.

`bin/test tests/verification/test_tampering_table.py -s` runs all of them, and prints what was found as Markdown.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.keys import key_pair
from helpers.tampering import CASES, Case
from helpers.tiny_checkpoint import Place, rehash, surgery_command

from surgery.checkpoint.signature import Signer

SAMPLE = ("middle mantissa bit of a slot", "hidden_act", "a library", "status")
WAYS = ("alone", "--against", "--digest", "--public-key")
Table = dict[str, dict[bool, dict[str, str]]]


@pytest.fixture(scope="module")
def signed(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple]]:
    """A signed copy of the checkpoint; and the options of each way to verify."""
    root = tmp_path_factory.mktemp("signed")
    private, public = key_pair(root)
    copy = Path(shutil.copytree(place.converted, root / "converted"))
    Signer(private).sign(copy)
    given = ("--against", place.source), ("--digest", place.verdict["digest"]), ("--public-key", public)
    return copy, {"alone": (), **{options[0]: options for options in given}}


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    found: Table = {}
    yield found
    print("\n| edit | hashes | " + " | ".join(WAYS) + " |\n|" + " --- |" * (len(WAYS) + 2))
    for name, rows in found.items():
        for anew, row in rows.items():
            print(f"| {name} | {'anew' if anew else 'as they were'} | " + " | ".join(row[way] for way in WAYS) + " |")


def expected(case: Case, anew: bool) -> dict[str, bool]:
    """Way -> whether the edit is to be seen as damage."""
    if not anew and case.rehash:
        note = case.seen == "note"
        return {way: not note or way == "--public-key" for way in WAYS}
    return {
        "alone": case.seen == "alone", "--against": case.seen in ("alone", "against"), "--digest": True,
        "--public-key": True,
    }  # fmt: skip


def judge(name: str, signed: tuple[Path, dict[str, tuple]], root: Path, table: Table) -> None:
    case, (original, ways) = CASES[name], signed
    for anew in (False, True) if case.rehash else (False,):
        copy = Path(shutil.copytree(original, root / f"{anew}"))
        case.edit(copy)
        if anew:
            rehash(copy)
        row = {}
        for way, damaged in expected(case, anew).items():
            ended = surgery_command("verify", copy, *ways[way])
            assert "Traceback" not in ended.err, ended.err
            assert ended.code == (3 if damaged else 0), f"{way}, hashes {'anew' if anew else 'kept'}: {ended.err}"
            noted = any(words in ended.out for words in (" since.", "generation settings were changed"))
            row[way] = ended.error.partition(":")[0] if damaged else "note" if noted else "-"
            assert not damaged or len(ended.error) < 600
        assert case.seen != "note" or anew or row["alone"] == "note"
        table.setdefault(name, {})[anew] = row


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_an_edit_is_seen_by_what_can_see_it(name: str, signed, tmp_path: Path, table: Table) -> None:
    judge(name, signed, tmp_path, table)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in SAMPLE])
def test_every_edit_is_seen_by_what_can_see_it(name: str, signed, tmp_path: Path, table: Table) -> None:
    judge(name, signed, tmp_path, table)
