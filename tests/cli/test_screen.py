"""What commands show: within 80 columns, in units, nothing but results where results go, and a last line."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers.tiny_checkpoint import MEASURED, Place, surgery_command
from rich.console import Console

from surgery.checkpoint.results import STDOUT
from surgery.cli.screen import Screen
from surgery.cli.show.console import output
from surgery.cli.show.pretrain import show_curves
from surgery.cli.show.progress import TerminalReporter
from surgery.cli.show.recipes import show_recipes
from surgery.cli.show.survey import scanned, show_survey
from surgery.recipe.builtin import builtin, summary
from surgery.report.verdict import markdown, outcome


@pytest.fixture
def narrow() -> Console:
    """A terminal of 80 columns that remembers."""
    return Console(file=io.StringIO(), width=80)


def layer(number: int) -> dict:
    """A row with figures as wide as real models have them."""
    return {
        "layer": number, "max": 123_456.7, "median": 12.345, "ratio": 123_456.0, "count": 12_345,
        "dims": [(14_150, 9), (14_160, 8), (14_170, 7), (14_180, 6), (14_190, 5)], "first_norm": 123_456.7,
        "rest_norm": 12_345.6, "p1": 0.99, "entropy_bits": 12.34, "sink_rate": 0.97, "mixing": 0.55,
    }  # fmt: skip


def made_up_survey() -> dict:
    delta = {"mean": 3.0, "low": -1.23456, "high": 12.3456}
    row = {
        "touched": 1_234_567,
        "ppl": 1_234_567.0,
        "delta_nll": delta,
        "sink_rate": 0.5,
        "entropy_bits": 12.3,
        "massive": 12_345,
    }
    return {
        "source": "owner/" + "long-name-" * 12, "layers": [layer(n) for n in (0, 31, 126)], "chunks": 64,
        "chunk_length": 512, "perplexity": {"ppl": 21.2644, "nll": 3.05, "tokens": 32_704}, "super_neurons": [],
        "massive_activations": {"count": 1228, "dims": [447]},
        "across": {"tokens": ["<s>"], "died": None, "born": 2, "phases": None},
        "interventions": [
            {"name": "attention to token 0 masked", "where": "all layers", **row},
            {"name": "token 8 amplified", "where": "layer 12", "error": "no such token"},
        ],
        "audit": {"scalars": 4, "tried": {}, "of": 294_912, "layer": 12},
    }  # fmt: skip


def test_a_survey_fits_80_columns_without_a_broken_word(narrow: Console) -> None:
    show_survey(narrow, made_up_survey())
    lines = [line for line in narrow.file.getvalue().splitlines() if not line.startswith("Survey of")]
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    for whole in (
        "123,456.7",
        "12.345",
        "14150, 14160, 14170, 14180",
        "sink rate",
        "median",
        "95% interval",
        "1.235e+06",
    ):
        assert whole in shown
    assert "Not possible: token 8 amplified, layer 12: no such token" in shown
    assert scanned(made_up_survey()).endswith(": 1,228 massive activations in 3 layers, perplexity 21.26")


def test_no_line_break_of_a_survey_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    show_survey(output(), made_up_survey())
    shown = capsys.readouterr().out
    assert "\\n" not in shown and shown.splitlines()[1] == ""


def test_curves_fit_80_columns(narrow: Console) -> None:
    last = {
        "loss": 12.3456,
        "ppl": 1234.56,
        "massive": 12_345,
        "massive_on_text": 12_345,
        "auto": 12_345,
        "ratio": 12_345.6,
    }
    found = {"measured": [{**last, "sink_rate": 0.97}]}
    show_curves(narrow, {"variants": {"attention_bias": found, "sink_token": found}}, "out")
    table = narrow.file.getvalue().split("Curves:")[0].splitlines()
    assert len([line for line in table if line.strip()]) == 4 and "scale-free" in table[1]


def test_recipes_fit_80_columns(narrow: Console) -> None:
    show_recipes(narrow, [{"name": name, "summary": summary(path.read_text())} for name, path in builtin().items()])
    assert len(narrow.file.getvalue().splitlines()) == len(builtin()) + 5  # none takes two lines


def test_the_list_of_commands_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = surgery_command("--help")
    assert ended.code == 0 and "..." not in ended.out.partition("Commands:")[2]
    assert max(map(len, ended.out.splitlines())) <= 80


def test_bytes_are_shown_in_units(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.cli.show.progress.LOG_SECONDS", -1)
    reporter = TerminalReporter()
    with reporter.bar("hash", 3_400_000_000, of_bytes=True) as advance:
        advance(1_200_000_000, "model.safetensors")
    with reporter.bar("scan", 4000) as advance:
        advance(1200, "sequences")
    logged = capsys.readouterr().err
    assert "model.safetensors: 1.2 GB of 3.4 GB after" in logged and "sequences: 1,200 of 4,000 after" in logged


# ---- the last line


@pytest.mark.parametrize(
    ("passed", "checks", "gates", "said"),
    [
        (True, [True] * 11, [True] * 3, "passed: 11 checks, 3 gates"),
        (True, [True], [], "passed: 1 check"),
        (False, [True] * 11, [True, False, False], "failed: 2 of 3 gates"),
        (False, [False, True], [True], "failed: 1 of 2 checks"),
        (False, [False], [False], "failed: 1 of 1 check, 1 of 1 gate"),
        (None, [True] * 8, [], "unverified: 8 checks"),
    ],
)
def test_a_verdict_in_one_line(passed: bool | None, checks: list[bool], gates: list[bool], said: str) -> None:
    integrity = {"passed": all(checks), "checks": [{"name": "c", "detail": "d", "passed": ok} for ok in checks]}
    judged = [{"name": "g", "value": 1.0, "limit": 1.0, "passed": ok} for ok in gates]
    assert outcome({"passed": passed, "gates": judged, "integrity": integrity}) == said


def test_a_summary_has_the_outcome_and_escapes_names(place: Place) -> None:
    written = markdown(place.verdict, "out\n<b>[x](y)")
    assert written.startswith("## out\\\\n\\<b>\\[x](y)\n\n**passed: ")
    for shown in ("* Perplexity of the converted model", "### Gates", "### Integrity", "| tokenizer |"):
        assert shown in written


@pytest.mark.parametrize("quiet", [False, True])
def test_every_command_ends_with_a_line(place: Place, tmp_path: Path, quiet: bool) -> None:
    texts = ("--text", place.text, *MEASURED)
    bad = Path(shutil.copytree(place.converted, tmp_path / "bad"))
    (bad / "generation_config.json").unlink()
    for code, line, *words in (
        (0, r"planned: tensors 4 added, \d+ kept; disk .* needed, .* free", "plan", place.recipe, place.source),
        (0, r"passed: \d+ checks", "verify", place.converted),
        (3, r"failed: 1 of \d+ checks", "verify", bad),
        (0, r"scanned .*source: \d+ massive activations? in 3 layers, perplexity [\d.]+", "scan", place.source, *texts),
        (0, r"12 recipes: clip-text, eab, .*", "recipes"),
    ):
        ended = surgery_command(*words, *(["-q"] if quiet else []))
        assert ended.code == code, ended.err
        *before, last = ended.out.splitlines()
        assert re.fullmatch(line, last), last
        assert bool(before) is not quiet
        assert not quiet or (ended.err == "" if code == 0 else len(ended.err.splitlines()) == 1)


def test_a_run_ends_with_what_came_of_it(place: Place, tmp_path: Path) -> None:
    ended = surgery_command("run", place.recipe, place.source, tmp_path / "out", "--no-verify", "--quiet")
    assert ended.code == 0 and not ended.err
    assert re.fullmatch(rf"unverified: \d+ checks; wrote {tmp_path / 'out'}\n", ended.out)


# ---- standard output


def test_a_dash_is_standard_output_and_it_holds_nothing_else(place: Place, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (("plan", "eab", place.source), ("verify", place.converted), ("recipes",), ("recipes", "eab")):
        ended = surgery_command(*words, "--json", "-")
        assert ended.code == 0 and json.loads(ended.out)
        found, quiet = (json.loads(text) for text in (ended.out, surgery_command(*words, "--json", "-", "-q").out))
        assert type(found) is type(quiet) and list(found) == list(quiet)
    assert "passed: " in surgery_command("verify", place.converted, "--json", "-").err
    ended = surgery_command("verify", place.converted, "--junit", "-")
    assert ended.code == 0 and ended.out.startswith("<?xml ") and ended.out.endswith("</testsuite>\n")
    assert surgery_command("verify", place.converted, "--summary", "-").out.startswith("## ")
    assert not list(tmp_path.iterdir())
    refused = surgery_command("verify", place.converted, "--json", "-", "--junit", "-").error
    assert refused == "only one result can go to standard output; give --json a file."
    assert surgery_command("recipes", "--json", "./-").code == 0 and json.loads((tmp_path / "-").read_text())


def test_a_quiet_screen_shows_only_its_end(capsys: pytest.CaptureFixture) -> None:
    for quiet, result, out, err in (
        (False, None, "table\nend\n", ""), (True, None, "end\n", ""),
        (False, STDOUT, "", "table\nend\n"), (True, STDOUT, "", "end\n"),
    ):  # fmt: skip
        screen = Screen(quiet, result, None)
        screen.tables.print("table")
        screen.end("end")
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == (out, err)
