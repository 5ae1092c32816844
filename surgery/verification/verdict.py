"""The verdict: everything that verification found, as JSON and as JUnit XML."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..words import asked
from .checks import Check, integrity_to_dict
from .equivalence import Equivalence
from .gates import Gate
from .gates.base import Judgement, Measured

# What XML 1.0 cannot hold, escaped or not: control characters, lone surrogates, two non-characters.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Findings:
    """What the steps of a verification found; empty or None where a step did not run.

    `measured`: what `found_by` gives; `said`: keys of the verdict that operations bring; `required`: what the caller
    asked for besides; `notes`: what has to be told though it is no fault.
    """

    checks: list[Check]
    judgements: list[Judgement] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    random_ids: Equivalence | None = None
    said: dict[str, Any] = field(default_factory=dict)
    required: list[Check] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def judged(
    gates: Sequence[Gate], original: Measured | None, converted: Measured, exact: bool
) -> list[Judgement]:  # fmt: skip
    """Every gate's judgements. `exact`: whether the converted model is to be the same function on this text."""
    return [
        judgement
        for gate in gates
        if exact or not gate.same_function
        for judgement in gate.judge(original, converted)
    ]  # fmt: skip


def found_by(
    gates: Sequence[Gate], original: Measured | None, converted: Measured, tokenizer=None
) -> dict[str, Any]:  # fmt: skip
    """What every gate has to say in the verdict: its keys."""
    found: dict[str, Any] = {}
    for gate in sorted(gates, key=lambda gate: not gate.always):  # as `gates.SHOWN`
        found |= gate.found(original, converted, tokenizer)
    return found


def build_verdict(findings: Findings) -> dict[str, Any]:
    """The JSON of `verdict.json`: passed only if every gate and every integrity check passed."""
    integrity = integrity_to_dict(findings.checks)
    passed = integrity["passed"] and all(judgement.passed for judgement in findings.judgements)
    passed = passed and all(check.passed for check in findings.required)
    gates = [judgement.to_dict() for judgement in findings.judgements]
    random_ids = {} if findings.random_ids is None else {"random_ids": findings.random_ids.to_dict()}
    required = {"required": [check.to_dict() for check in findings.required]} if findings.required else {}
    notes = [*(note for check in findings.checks for note in check.notes), *findings.notes]
    return {
        "passed": passed, "gates": gates, "integrity": integrity, **required, **({"notes": notes} if notes else {}),
        **findings.said, **random_ids, **findings.measured,
    }  # fmt: skip


def plain_json(value):
    """`value` with NaN and infinities as text ("nan", "inf"): JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _xml_text(text: str) -> str:
    return _NOT_XML.sub(lambda match: ascii(match.group())[1:-1], text)


def junit_xml(verdict: Mapping[str, Any], name: str) -> str:
    """The gates and checks of a verdict on the checkpoint `name` as JUnit XML, one test case each, for CI servers."""
    suite = ElementTree.Element("testsuite", name=_xml_text(f"surgery verify {name}"))
    failures = 0
    told = {key: verdict[key] for key in ("status", "digest") if verdict.get(key) is not None}
    said = [(name, value) for name in ("notes", "unchecked") for value in verdict.get(name, ())]
    if told or said:
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in [*told.items(), *said]:
            ElementTree.SubElement(properties, "property", name=name, value=_xml_text(value))
    cases = [(f"gate.{g['name']}", g["passed"], f"{g['value']}, asked for {asked(g)}") for g in verdict["gates"]]
    cases += [(f"integrity.{c['name']}", c["passed"], c["detail"]) for c in verdict["integrity"]["checks"]]
    cases += [(f"required.{c['name']}", c["passed"], c["detail"]) for c in verdict.get("required", ())]
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
