"""Zero-shot tasks: the drop by hand, the recipe; where lm-evaluation-harness is installed, a task on local data."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.tiny_checkpoint import MEASURED, Place, surgery_command

from surgery.errors import RecipeError, SourceError
from surgery.steps.recipe import parse_recipe
from surgery.verification.gates.base import Measured
from surgery.verification.gates.tasks import Tasks, TaskScore, TaskSet, drop

BASE = "surgery: 1\noperations: [attention_bias: {prefix: [5]}]\n"
WHY = "lm-evaluation-harness is 50 packages, 600 MB, not in the test extra: pip install 'checkpoint-surgery[tasks]'"


def test_a_drop_is_paired_by_document() -> None:
    before, after = (TaskScore(values, 0.1) for values in ((1.0, 1.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0)))
    found = drop(before, after)  # differences 0, 1, 0, 0: mean 1/4, standard deviation 1/2, t(3) = 3.182
    assert found.mean == 0.25 and found.high == pytest.approx(0.25 + 3.182 * 0.5 / 2, abs=1e-2)
    same = drop(before, before)
    assert (same.low, same.mean, same.high) == (-0.75, 0.0, 0.75), "four equal answers prove little"


def test_each_metric_is_judged_and_told() -> None:
    """What needs no harness: judgements, part of the verdict and table, of scores by hand."""
    gate = Tasks(names=("a",), max_drop=0.9)
    before = Measured({}, further={"tasks": {("a", "acc"): TaskScore((1.0, 1.0, 0.0, 1.0), 0.25)}})
    after = Measured({}, further={"tasks": {("a", "acc"): TaskScore((1.0, 0.0, 0.0, 1.0), math.nan)}})
    (judgement,) = gate.judge(before, after)
    assert judgement.name == "tasks.a.acc" and judgement.passed is False and judgement.value > 0.9
    assert Tasks.label(judgement.name) == "drop in a, acc"
    found = gate.found(before, after, None)
    entry = found["tasks"]["a"]["acc"]
    assert (entry["documents"], entry["original"], entry["converted"], entry["drop"]["mean"]) == (4, 0.75, 0.5, 0.25)
    (row,) = Tasks.table(found).rows
    assert row[:4] == ("a, acc", "4", "0.750 ± 0.250", "0.500 ± –") and row[4].startswith("+0.25 (−0.54")
    assert gate.judge(None, after) == [] and gate.found(None, after, None) == {}


def test_what_a_recipe_says_of_tasks() -> None:
    tasks = parse_recipe(BASE + "verify: {tasks: {names: [arc_easy, piqa], max_drop: 0}}", "r").verify.tasks
    assert tasks.names == ("arc_easy", "piqa") and tasks.limit is None and tasks.max_drop == 0
    for wrong, said in {
        "{names: [], max_drop: 0.1}": "names is an empty list",
        "{names: arc_easy, max_drop: 0.1}": "it must be a list",
        "{names: [3], max_drop: 0.1}": "it must be text",
        "{names: [a]}": r"the key 'max_drop' is missing; add 'max_drop: 0.02'",
        "{max_drop: 1}": r"the key 'names' is missing; add 'names: \[arc_easy\]'",
        "{names: [a], max_drop: .nan}": "a gate that is not a number",
        "{names: [a], max_drop: 0.1, limit: many}": "which is not a whole number",
        "{names: [a], max_drop: 0.1, limits: 5}": "did you mean 'limit'",
    }.items():
        with pytest.raises(RecipeError, match=said):
            parse_recipe(BASE + f"verify: {{tasks: {wrong}}}", "r")


def with_tasks(place: Place, path: Path, tasks: str) -> Path:
    path.write_text(place.recipe.read_text().rstrip() + f"\n  tasks: {tasks}\n")
    return path


def test_without_the_harness_the_way_out_is_named(place: Place, tmp_path: Path, monkeypatch) -> None:
    recipe = with_tasks(place, tmp_path / "r.yaml", "{names: [own_choice], max_drop: 0.1}")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.setattr("surgery.steps.operate.live_original", lambda *a, **k: pytest.fail("weights were read"))
    texts = ("--text", place.text, *MEASURED)
    for arguments in (("plan", recipe, place.source), ("run", recipe, place.source, tmp_path / "out", *texts)):
        refused = surgery_command(*arguments)
        assert refused.code == 2 and "checkpoint-surgery[tasks]" in refused.error


def test_texts_are_cut_alike_and_a_broken_task_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the harness: what it is asked for, and what becomes of its errors."""
    asked, model = [], types.ModuleType("lm_eval.models.huggingface")
    harness = types.ModuleType("lm_eval")
    model.HFLM = lambda **options: asked.append(options["max_length"])
    harness.evaluate = lambda **options: {}
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", model)
    tasks = TaskSet(lambda: {"tasks": {}}, None, 254)
    assert tasks.measure(None, None) == {} and asked == [254]
    for error, raised in ((ValueError("no such field"), SourceError), (MemoryError(), MemoryError)):
        harness.evaluate = lambda error=error, **options: (_ for _ in ()).throw(error)
        with pytest.raises(raised):
            tasks.measure(None, None)


CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
TEXT = """
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of task files on local data."""
    pytest.importorskip("lm_eval", reason=WHY)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = torch.Generator().manual_seed(0)
    words = ["river", "stone", "cloud", "winter", "bread", "north"]

    def pick() -> str:
        return words[int(torch.randint(len(words), (), generator=source))]

    questions = [(f"the {pick()} {pick()}", [pick(), f"{pick()} and"]) for _ in range(60)]
    rows = [{"question": q, "choices": choices, "answer": i % 2} for i, (q, choices) in enumerate(questions)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_choice.yaml").write_text(CHOICE.format(name="own_choice", data=tmp_path / "docs.jsonl"))
    (folder / "lost.yaml").write_text(CHOICE.format(name="lost", data=tmp_path / "nowhere.jsonl"))
    (folder / "own_text.yaml").write_text(TEXT.format(data=tmp_path / "docs.jsonl"))
    return folder


def by_hand(place: Place, root: Path, rows: list[dict]) -> list[float]:
    """Which choice is likelier, one row at a time, without the harness."""
    from transformers import AutoModelForCausalLM

    from surgery.converted.registration import register
    from surgery.live.loading import load_tokenizer

    register()
    tokenizer, model = load_tokenizer(root), AutoModelForCausalLM.from_pretrained(root).eval()
    right = []
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            context = tokenizer(row["question"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].log_softmax(-1)
            taken = logits.gather(-1, ids[0, 1:, None])[:, 0]
            likelihoods.append(taken[len(context) - 1 :].sum().item())
        right.append(float(likelihoods.index(max(likelihoods)) == row["answer"]))
    return right


def test_a_task_on_local_data(place: Place, own: Path, tmp_path: Path) -> None:
    recipe = with_tasks(place, tmp_path / "r.yaml", "{names: [own_choice], max_drop: 0.9, limit: 50}")
    out, result = tmp_path / "out", tmp_path / "v.json"
    texts = ("--text", place.text, "--calibration", place.text, *MEASURED, "--tasks", own)
    ended = surgery_command("run", recipe, place.source, out, *texts, "--json", result)
    assert ended.code == 0 and "own_choice, acc" in ended.out and "Tokenizing" not in ended.err, ended.err
    verdict = json.loads(result.read_text())
    entry = verdict["tasks"]["own_choice"]["acc"]
    rows = [json.loads(line) for line in (tmp_path / "docs.jsonl").read_text().splitlines()][:50]
    before, after = by_hand(place, place.source, rows), by_hand(place, out, rows)
    assert entry["documents"] == 50 and entry["original"] == pytest.approx(sum(before) / 50)
    assert entry["converted"] == pytest.approx(sum(after) / 50)
    assert entry["original_stderr"] == pytest.approx(math.sqrt(entry["original"] * (1 - entry["original"]) / 49))
    assert entry["drop"] == pytest.approx(drop(TaskScore(tuple(before), 0), TaskScore(tuple(after), 0)).to_dict())
    gate = next(gate for gate in verdict["gates"] if gate["name"] == "tasks.own_choice.acc")
    assert gate["value"] == entry["drop"]["high"] > 0 and gate["limit"] == 0.9
    checked = surgery_command("verify", out, "--against", place.source, *texts, "--json", result)
    assert checked.code == 0 and json.loads(result.read_text())["tasks"] == verdict["tasks"]
    with_tasks(place, recipe, "{names: [own_choice], max_drop: 0, limit: 50}")
    failed = surgery_command("run", recipe, place.source, tmp_path / "failed", *texts)
    assert failed.code == 1 and "tasks.own_choice.acc" in failed.error


def test_tasks_that_cannot_be_compared_are_refused_first(place, own: Path, tmp_path: Path, monkeypatch) -> None:
    """Tasks that cannot be compared are refused before any work is done."""
    monkeypatch.setattr("surgery.steps.operate.live_original", lambda *a, **k: pytest.fail("weights were read"))
    texts = ("--text", place.text, *MEASURED, "--tasks", own)
    for names, said in {"[lost]": "cannot be loaded", "[own_text]": "no mean over documents"}.items():
        recipe = with_tasks(place, tmp_path / "r.yaml", f"{{names: {names}, max_drop: 0.1}}")
        refused = surgery_command("run", recipe, place.source, tmp_path / "out", *texts)
        assert refused.code == 2 and said in refused.error
    refused = surgery_command("run", place.recipe, place.source, tmp_path / "out", *texts)
    assert refused.code == 2 and "no gate of the recipe is on tasks" in refused.error
