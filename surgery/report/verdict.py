"""A verdict in tables and sentences, the same for terminal, model card and report; made from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..operations import OPERATIONS
from ..operations.base import Operation
from ..table import FAILED, PASSED, Table, plain
from ..tuning.operation import Tune
from ..verification.gates import SHOWN, Gate
from ..words import asked, count_of, reached, visible_name

if TYPE_CHECKING:
    from ..verification.verify import Verify

CHANGES: tuple[type[Operation], ...] = (*OPERATIONS, Tune)


def tables(verdict: Mapping[str, Any], gates: Verify | None = None) -> dict[str, Table]:
    """Key -> table of all that was found, in the order to show; `gates` are those of the recipe, where it is known."""
    found = {gate.name: gate.table(verdict, getattr(gates, gate.name, None)) for gate in SHOWN}
    found |= {change.key or change.name: change.table(verdict) for change in CHANGES}
    found["gates"] = _gates(verdict)
    found["integrity"] = _integrity(verdict)
    return {key: table for key, table in found.items() if table is not None}


def sentences(verdict: Mapping[str, Any]) -> list[str]:
    """The outcome in plain words, what failed first."""
    gates, checks = verdict.get("gates") or [], _checks(verdict)
    passed = f"Passed: {count_of(len(gates), 'gate')} and {count_of(len(checks), 'check')} of the files."
    return [*(failures(verdict) or [passed]), *findings(verdict)]


def findings(verdict: Mapping[str, Any]) -> list[str]:
    """What operations and gates have to say, in sentences."""
    speaking: tuple[type[Operation] | type[Gate], ...] = (*OPERATIONS, *SHOWN, Tune)
    said = [one.sentence(verdict) for one in speaking]
    return [sentence for sentence in said if sentence]


def outcome(verdict: Mapping[str, Any]) -> str:
    """One line: "passed: 11 checks, 3 gates", "failed: 1 of 11 checks, 2 of 3 gates", or "unverified: 11 checks"."""
    kinds = {"check": [*_checks(verdict), *(verdict.get("required") or [])], "gate": verdict.get("gates") or []}
    failed = {kind: sum(not one["passed"] for one in found) for kind, found in kinds.items()}
    if any(failed.values()):
        parts = [f"{count} of {count_of(len(kinds[kind]), kind)}" for kind, count in failed.items() if count]
        return f"failed: {', '.join(parts)}"
    parts = [count_of(len(found), kind) for kind, found in kinds.items() if found]
    return f"{'unverified' if verdict['passed'] is None else 'passed'}: {', '.join(parts)}"


def markdown(verdict: Mapping[str, Any], name: str) -> str:
    """What was found of the checkpoint `name`, for the summary of a CI job: outcome, sentences and all tables."""
    said = "\n".join(f"* {plain(sentence)}" for sentence in [*failures(verdict), *findings(verdict)])
    shown = [table.markdown() for table in tables(verdict).values()]
    parts = (f"## {plain(visible_name(name))}", f"**{outcome(verdict)}**", said, *shown)
    return "\n\n".join(part for part in parts if part) + "\n"


def card_tables(verdict: Mapping[str, Any], gates: Verify) -> str:
    """The tables for a model card, which is written before the files are checked."""
    return "\n\n".join(table.markdown() for table in tables(verdict, gates).values())


def failures(verdict: Mapping[str, Any]) -> list[str]:
    """What failed, a sentence each."""
    gates, checks = verdict.get("gates") or [], _checks(verdict)
    said = [
        f"Failed: {_label(gate['name'])}: {reached(gate)}, and asked for was {asked(gate)}."
        for gate in gates
        if not gate["passed"]
    ]
    said += [
        f"Failed: {visible_name(check['name'])}: {visible_name(check['detail']).rstrip('.')}."
        for check in checks
        if not check["passed"]
    ]
    return said


def _gates(verdict: Mapping[str, Any]) -> Table | None:
    rows = [
        (_label(gate["name"]), reached(gate), asked(gate), PASSED if gate["passed"] else FAILED)
        for gate in verdict.get("gates") or []
    ]
    if not rows:
        return None
    text = "What the recipe asks for. Of whatever has an interval, its far end must hold."
    return Table("Gates", ("", "found", "asked for", "result"), rows, text=text)


def _integrity(verdict: Mapping[str, Any]) -> Table | None:
    rows = [
        (visible_name(check["name"]), visible_name(check["detail"]), PASSED if check["passed"] else FAILED)
        for check in _checks(verdict)
    ]
    if not rows:
        return None
    text = "Whether the files are what they say: read, compared and counted, without the model."
    return Table("Integrity", ("", "found", "result"), rows, text=text, words=2)


def _checks(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    return (verdict.get("integrity") or {}).get("checks") or []


def _label(judgement: str) -> str:
    """The name of a judgement in words, by the gate that made it."""
    kinds = {gate.name: gate for gate in SHOWN}
    gate = kinds.get(judgement.partition(".")[0])
    return gate.label(judgement) if gate else visible_name(judgement)
