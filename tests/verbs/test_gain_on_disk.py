"""Smoothed, normed, tuned and gated: what plan, model card and report say of it, against the verdict."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers.tiny_checkpoint import MEASURED, Ended, Place, surgery_command, write_text

import surgery
from surgery.live.text import in_turn
from surgery.tuning.operation import Tune
from surgery.tuning.settings import Lora
from surgery.tuning.words import tuned
from surgery.verification.gates.quantised import NAMES
from surgery.words import WIDTH, wrapped

pytestmark = pytest.mark.slow

RECIPE = """surgery: 1
operations:
  - attention_bias: {prefix: ["<s>", "\\n"]}
  - smoothing: {}
  - head_norm: {gate: 1}
tune: {steps: 4, length: 16, held_out: 2, evaluate_every: 2, lora: {rank: 2, targets: [q_proj, down_proj]}}
verify:
  perplexity: {max_ratio: 9.0}
  massive_activations: {max: 1000000}
  quantised: {w8a8_static: {max_ratio: 9.0}, kv2: {max_ratio: 9.0}}
  streaming: {window: 8, max_ratio: 9.0}
  cache_edits: {tokens: 8, max_ratio: 9.0}
"""


@pytest.fixture(scope="module")
def made(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with recipe, verdict, report, and what was written."""
    root = tmp_path_factory.mktemp("gained")
    (root / "r.yaml").write_text(RECIPE, encoding="utf-8")
    ended = surgery_command(
        "run", root / "r.yaml", place.source, root / "out", "--text", place.text, *MEASURED, "--json", root / "v.json",
        "--report", root / "r.html",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    (root / "notes").write_text(ended.err, encoding="utf-8")
    return root


def verdict_of(made: Path) -> dict:
    return json.loads((made / "v.json").read_text(encoding="utf-8"))


def test_a_plan_says_what_will_be_trained(place: Place, made: Path) -> None:
    planned = surgery.plan(made / "r.yaml", str(place.source)).to_dict()["tune"]
    assert planned == {"steps": 4, "slots": 2, "normed_sites": 2, "lora": {"rank": 2, "layers": 4}}
    ended = surgery_command("plan", made / "r.yaml", place.source)
    assert "up to 4 steps: 2 slots at each site; norms of the heads at 2 sites; LoRA of rank 2 on 4 linear" in ended.out
    assert surgery.plan(place.recipe, str(place.source)).to_dict()["tune"] is None
    assert "tuned" not in surgery_command("plan", place.recipe, place.source).out


def test_the_card_has_the_verdict_in_short_tables(made: Path) -> None:
    card, verdict = (made / "out" / "README.md").read_text(encoding="utf-8"), verdict_of(made)
    for name, entry in verdict["quantised"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {NAMES[name]} |"))
        assert f"| {entry['original']['ppl']:.4f} |" in row and f"| {entry['converted']['ppl']:.4f} |" in row
    assert "window of the last 8 tokens" in card and f"| {verdict['streaming']['converted']['ppl']:.4f} |" in card
    assert "cache with 8 tokens edited" in card and "| middle tokens deleted |" in card
    assert card.count("✓ passed") == len(verdict["gates"]) and "✗" not in card


def test_the_card_says_what_was_smoothed_and_tuned(made: Path) -> None:
    card, verdict = (made / "out" / "README.md").read_text(encoding="utf-8"), verdict_of(made)
    head = card.split("## Load")[0]
    smoothed = re.search(r"(\d+) tensors changed by powers of two", (made / "notes").read_text(encoding="utf-8")).group(
        1
    )
    assert f"Smoothing has scaled {smoothed} tensors by powers of two, the same function" in head
    said, tuning = " ".join(head.split()), verdict["tuning"]
    assert "trained the slots, the norms of the heads and LoRA of rank 2 on 4 linear layers for 4 steps." in said
    best = next(entry for entry in tuning["held_out"] if entry["step"] == tuning["best_step"])
    if best["step"]:
        assert f"Kept is the state after step {best['step']}, and LoRA is merged into 4 tensors" in said
        assert f"went from {tuning['held_out'][0]['ppl']:.4f} to {best['ppl']:.4f}." in said
    else:
        assert "None was better on held-out text than the start, which was kept." in said


def test_the_card_tells_whether_tuning_helped() -> None:
    """Tuning that helped and tuning that did not read differently."""
    judged = [{"step": 0, "ppl": 50.0}, {"step": 100, "ppl": 25.0}, {"step": 200, "ppl": 26.0}]
    found = {"held_out": judged, "losses": [{"step": step, "loss": 1.0} for step in range(1, 201)], "best_step": 100}
    settings = Tune(steps=300, quantised="w8a8_static", lora=Lora(rank=4))
    said = tuned(settings, ["the slots"], 210, found)
    assert max(map(len, wrapped(said).splitlines())) <= WIDTH and said == (
        "Tuning has trained the slots and LoRA of rank 4 on 210 linear layers for 200 steps. Kept is the state after "
        "step 100, and LoRA is merged into 210 tensors; perplexity on held-out text, quantised (w8a8_static), went "
        "from 50.0000 to 25.0000."
    )
    kept = tuned(Tune(steps=300), ["the norms of the heads"], 0, {**found, "best_step": 0})
    assert "trained the norms of the heads for 200 steps. None was better" in " ".join(kept.split())
    assert "merged" not in kept and "went from" not in kept


def test_a_card_is_silent_about_operations_that_were_not_done(place: Place) -> None:
    card = (place.converted / "README.md").read_text(encoding="utf-8")
    assert not re.search("Smoothing|Tuning|Quantised|Streaming|edited", card)


def test_the_report_of_a_run_shows_its_verdict(made: Path) -> None:
    page, verdict = (made / "r.html").read_text(encoding="utf-8"), verdict_of(made)
    assert page.index('id="gain"') < page.index('id="summary"')
    for key in ("perplexity", "massive_activations", "quantised", "streaming", "cache_edits", "gates", "tuning"):
        assert f'id="gain-{key}"' in page
    assert 'id="gain-tasks"' not in page
    for entry in verdict["quantised"].values():
        assert f">{entry['original']['ppl']:.4f}<" in page and f">{entry['converted']['ppl']:.4f}<" in page
    checks = verdict["integrity"]["checks"]
    assert page.count("✓ passed") == len(verdict["gates"]) + len(checks) and "✗" not in page


def test_static_scales_are_judged_by_the_worst_text(place: Place, tmp_path: Path) -> None:
    """Two texts take turns, so each of two sets of scales has half of its chunks from either."""
    other = write_text(tmp_path / "other.txt", 1500, seed=7)
    recipe = RECIPE.partition("  - head_norm")[0] + "verify:\n  perplexity: {max_ratio: 9.0}\n"
    recipe += "  massive_activations: {max: 1000000}\n  quantised: {calibrations: 2, w8a8_static: {max_ratio: LIMIT}}\n"

    def run(limit: float) -> Ended:
        (tmp_path / "r.yaml").write_text(recipe.replace("LIMIT", str(limit)), encoding="utf-8")
        return surgery_command(
            "run", tmp_path / "r.yaml", place.source, tmp_path / "out", "--text", place.text, "--calibration", other,
            "--calibration", place.text, *MEASURED, "--json", tmp_path / "v.json",
        )  # fmt: skip

    assert run(9.0).code == 0
    verdict = json.loads((tmp_path / "v.json").read_text())
    entry = verdict["quantised"]["w8a8_static"]
    sets = entry["calibrations"]["converted"]
    assert len(sets) == 2 and sets[0] != sets[1] and entry["converted"]["ppl"] in sets
    assert verdict["provenance"]["chunks"]["calibration"]["count"] == 2 * 4
    judged = next(gate["value"] for gate in verdict["gates"] if gate["name"] == "quantised.w8a8_static")
    assert judged > max(sets) / verdict["perplexity"]["bare"]["ppl"]  # the upper end of the interval of either
    shutil.rmtree(tmp_path / "out")
    assert run(judged * 0.9999).code == 1


def test_a_text_without_a_turn_is_refused(place: Place, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    recipe = tmp_path / "smoothing.yaml"
    recipe.write_text(RECIPE.partition("  - head_norm")[0])
    ended = surgery_command(
        "run", recipe, place.source, tmp_path / "out", "--text", place.text, "--calibration", place.text,
        "--calibration", short, *MEASURED,
    )  # fmt: skip
    assert ended.code == 2 and "calibration text 2 of 2 has" in ended.error and "leave that file out" in ended.error


def test_texts_take_turns() -> None:
    a, b = list(range(10)), list(range(100, 105))
    assert in_turn([a], 4) == a
    assert in_turn([a, b], 2) == [0, 1, 100, 101, 2, 3, 102, 103, 4, 5, 6, 7, 8, 9]
