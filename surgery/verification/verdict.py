"""The verdict: everything that verification found, as JSON and as JUnit XML."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

from ..live.likelihood import Score
from ..live.paired import paired
from .equivalence import Equivalence
from .gates.cache_edits import EDITS, kept_edit
from .gates.judge import Gate
from .gates.measure import Measurement, Original
from .gates.streaming import KEPT
from .gates.tasks import drop
from .integrity import Check, integrity_to_dict

# What XML 1.0 cannot hold, escaped or not: control characters, lone surrogates, two non-characters.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Findings:
    """What the steps of a verification found; None where a step did not run."""

    checks: list[Check]
    gates: list[Gate]
    original: Original | None = None
    converted: Measurement | None = None
    random_ids: Equivalence | None = None
    search: dict | None = None
    prefix: dict | None = None
    tuning: dict | None = None


def build_verdict(findings: Findings, tokenizer=None) -> dict:
    """The JSON of `verdict.json`: passed only if every gate and every integrity check passed."""
    integrity = integrity_to_dict(findings.checks)
    passed = integrity["passed"] and all(gate.passed for gate in findings.gates)
    verdict = {"passed": passed, "gates": [gate.to_dict() for gate in findings.gates], "integrity": integrity}
    if findings.prefix is not None:
        verdict["prefix"] = findings.prefix
    if findings.random_ids is not None:
        verdict["random_ids"] = findings.random_ids.to_dict()
    if findings.converted is not None:
        verdict["perplexity"] = _perplexities(findings)
        verdict["delta_nll"] = _differences(findings)
        before = findings.original.bare.massive if findings.original is not None else None
        after = findings.converted.massive
        verdict["massive_activations"] = {"before": _named(before, tokenizer), "after": _named(after, tokenizer)}
        if findings.original is not None and findings.converted.quantised:
            verdict["quantised"] = _quantised(findings.original.bare, findings.converted)
        if findings.original is not None and findings.converted.streaming:
            verdict["streaming"] = _streaming(findings.original.bare, findings.converted)
        if findings.original is not None and findings.converted.edits:
            verdict["cache_edits"] = _edited(findings.original.bare, findings.converted)
        if findings.original is not None and findings.converted.tasks:
            verdict["tasks"] = _tasks(findings.original.bare, findings.converted)
    if findings.tuning is not None:
        verdict["tuning"] = findings.tuning
    if findings.search is not None:
        verdict["prefix_search"] = findings.search
    return verdict


def _perplexities(findings: Findings) -> dict:
    original = findings.original
    scores = {} if original is None else {"bare": original.bare, "bos": original.bos, "control": original.control}
    scores["converted"] = findings.converted
    return {name: measured.score.to_dict() if measured is not None else None for name, measured in scores.items()}


def _differences(findings: Findings) -> dict:
    if findings.original is None:
        return {}
    score, original = findings.converted.score, findings.original
    return {
        "vs_control": paired(score, original.control.score).to_dict(),
        "vs_bare": paired(score, original.bare.score).to_dict(),
    }


def _quantised(bare: Measurement, converted: Measurement) -> dict:
    """Scheme -> both scores, and each one's difference to the bare original that is not quantised.

    Where it was `executed`, the same of that, and each one's difference to its simulation.
    """
    found = {
        name: _beside(bare.quantised[name], score, bare.score) for name, score in converted.quantised.items()
    }  # fmt: skip
    for name, score in converted.executed.items():
        entry = found[name]["executed"] = _beside(bare.executed[name], score, bare.score)
        entry["delta_nll"]["original_vs_simulated"] = paired(bare.executed[name], bare.quantised[name]).to_dict()
        entry["delta_nll"]["converted_vs_simulated"] = paired(score, converted.quantised[name]).to_dict()
    return found


def _beside(original: Score, converted: Score, bare: Score) -> dict:
    return {
        "original": original.to_dict(),
        "converted": converted.to_dict(),
        "delta_nll": {
            "original": paired(original, bare).to_dict(),
            "converted": paired(converted, bare).to_dict(),
        },
    }


def _streaming(bare: Measurement, converted: Measurement) -> dict:
    """Scores through the window: the original keeping nothing and keeping its first tokens, the converted nothing."""
    evicted, kept, found = bare.streaming[0], bare.streaming[KEPT], converted.streaming[0]
    return {
        "original": evicted.to_dict(),
        "original_kept": {"tokens_kept": KEPT, **kept.to_dict()},
        "converted": found.to_dict(),
        "delta_nll": {
            "original_vs_kept": paired(evicted, kept).to_dict(),
            "converted_vs_kept": paired(found, kept).to_dict(),
        },
    }


def _edited(bare: Measurement, converted: Measurement) -> dict:
    """Edit -> scores of original, original that keeps its first tokens, converted, and each one's price.

    That is the difference to the same model on the same targets, unedited ("none").
    """
    found = {"none": {"original": bare.edits["none", 0].to_dict(), "converted": converted.edits["none", 0].to_dict()}}
    for edit in EDITS:
        scores = {
            "original": bare.edits[edit, 0],
            "original_kept": kept_edit(bare.edits, edit),
            "converted": converted.edits[edit, 0],
        }
        whole = {"original": bare, "original_kept": bare, "converted": converted}
        deltas = {name: paired(score, whole[name].edits["none", 0]) for name, score in scores.items()}
        deltas["converted_vs_kept"] = paired(scores["converted"], scores["original_kept"])
        found[edit] = {name: score.to_dict() for name, score in scores.items()}
        found[edit]["delta_nll"] = {name: delta.to_dict() for name, delta in deltas.items()}
    return found


def _tasks(bare: Measurement, converted: Measurement) -> dict:
    """Task -> metric -> both means over documents, their standard errors, and the drop, paired by document."""
    found: dict[str, dict] = {}
    for (task, metric), after in converted.tasks.items():
        before = bare.tasks[task, metric]
        found.setdefault(task, {})[metric] = {
            "documents": len(after.values),
            "original": before.mean,
            "original_stderr": before.stderr,
            "converted": after.mean,
            "converted_stderr": after.stderr,
            "drop": drop(before, after).to_dict(),
        }
    return found


def _named(massive: dict | None, tokenizer) -> dict | None:
    """A summary of massive activations with its token ids also as text."""
    if massive is None or tokenizer is None:
        return massive
    return {**massive, "tokens": [tokenizer.decode([token]) for token in massive["token_ids"]]}


def plain_json(value):
    """`value` with NaN and infinities as text ("nan", "inf"): JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _xml_text(text: str) -> str:
    return _NOT_XML.sub(lambda match: ascii(match.group())[1:-1], text)


def junit_xml(verdict: dict) -> str:
    """The gates and checks of a verdict as JUnit XML, one test case each, for CI servers."""
    suite = ElementTree.Element("testsuite", name="surgery verify")
    failures = 0
    cases = [(f"gate.{g['name']}", g["passed"], f"{g['value']} against limit {g['limit']}") for g in verdict["gates"]]
    cases += [(f"integrity.{c['name']}", c["passed"], c["detail"]) for c in verdict["integrity"]["checks"]]
    for name, passed, detail in ((_xml_text(name), passed, _xml_text(detail)) for name, passed, detail in cases):
        case = ElementTree.SubElement(suite, "testcase", classname="surgery", name=name)
        if passed:
            ElementTree.SubElement(case, "system-out").text = detail
        else:
            failures += 1
            ElementTree.SubElement(case, "failure", message=detail)
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(failures))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
