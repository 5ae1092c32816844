"""The verdict: its keys, what makes it pass, and its two file formats."""

from __future__ import annotations

import hashlib
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
from helpers.measured import measured
from helpers.tiny_checkpoint import Place
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.checkpoint.results import json_text
from surgery.live.paired import Score
from surgery.verification.checks import Check
from surgery.verification.gates.base import Judgement, at_least
from surgery.verification.verdict import Findings, build_verdict, found_by, junit_xml, plain_json
from surgery.verification.verify import Verify

GOOD, BAD = Check("files", True, "fine"), Check("slots", False, "model.x is all zeros")


class Decoder:
    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


ORIGINAL = measured(1, bare=Score((4.0, 6.0), 2), control=Score((3.0, 5.0), 2))
CONVERTED = measured(0, converted=Score((3.0, 5.0), 2))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("check", [GOOD, BAD])
def test_it_passes_only_if_everything_passed(gate: bool, check: Check) -> None:
    verdict = build_verdict(Findings([GOOD, check], [Judgement("a", True, 0, 1), Judgement("b", gate, 2, 1)]))
    assert verdict["passed"] is (gate and check.passed)
    assert verdict["integrity"]["passed"] is check.passed
    assert verdict["gates"][1] == {"name": "b", "passed": gate, "value": 2, "limit": 1}
    assert "perplexity" not in verdict  # what was not measured is not there


def test_the_keys_are_those_of_the_design() -> None:
    verdict = build_verdict(Findings([GOOD], [], found_by(Verify().gates(), ORIGINAL, CONVERTED, Decoder())))
    assert set(verdict["perplexity"]) == {"bare", "bos", "control", "converted"}
    assert verdict["perplexity"]["bos"] is None
    assert verdict["perplexity"]["bare"] == {"ppl": math.exp(2.5), "nll": 2.5, "tokens": 4}
    assert set(verdict["delta_nll"]) == {"vs_control", "vs_bare"}
    assert verdict["delta_nll"]["vs_bare"]["mean"] == -0.5
    assert set(verdict["delta_nll"]["vs_bare"]) == {"mean", "low", "high"}
    massive = verdict["massive_activations"]
    assert (massive["before"]["count"], massive["after"]["count"]) == (1, 0)
    assert {"count", "worst_ratio", "dims", "layers"} <= set(massive["before"])
    assert massive["before"]["tokens"] == ["<5>"]


def test_a_real_verdict_has_them_all(place: Place) -> None:
    verdict = place.verdict
    assert verdict["passed"] is True
    assert {"gates", "integrity", "perplexity", "delta_nll", "massive_activations", "random_ids"} <= set(verdict)
    assert {gate["name"] for gate in verdict["gates"]} == {"equivalence", "perplexity", "massive_activations"}
    tokens = {score["tokens"] for score in verdict["perplexity"].values()}
    assert tokens == {4 * 31}  # every variant on the same targets: the first token of a chunk is never one
    assert verdict["prefix"]["tokens"] == ["<s>", "\n"]
    manifest = json.loads((place.converted / "surgery.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((place.converted / "surgery.json").read_bytes()).hexdigest()
    assert verdict.pop("digest") == f"sha256:{digest}"  # of the manifest, so it cannot be inside
    assert verdict.pop("provenance")["recipe"] == manifest["recipe"]  # which stands there by itself
    assert manifest["verdict"] == verdict and manifest["status"] == "verified"


def test_without_the_original_there_is_nothing_to_compare_with() -> None:
    verdict = build_verdict(Findings([GOOD], [], found_by(Verify().gates(), None, CONVERTED)))
    assert set(verdict["perplexity"]) == {"converted"} and verdict["delta_nll"] == {}
    assert verdict["massive_activations"]["before"] is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(st.characters(codec="utf-8")), values))
def test_any_result_is_json_that_strict_readers_take(result: dict) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = json_text(plain_json(result))
    assert plain_json(json.loads(text, parse_constant=refuse)) == plain_json(result)


def test_what_is_not_a_number_is_told_in_words() -> None:
    found = plain_json({"a": [math.inf, -math.inf, math.nan, 1.5], "b": (1, True, None)})
    assert found == {"a": ["inf", "-inf", "nan", 1.5], "b": [1, True, None]}


@given(st.text(), st.text(), st.booleans())
def test_junit_is_well_formed_whatever_was_found(name: str, detail: str, passed: bool) -> None:
    verdict = build_verdict(Findings([Check(name, passed, detail), GOOD], [Judgement("g", not passed, math.nan, 1)]))
    suite = ElementTree.fromstring(junit_xml(verdict, "out").encode("utf-8"))
    cases = list(suite.iter("testcase"))
    assert suite.get("tests") == str(len(cases)) == "3"
    assert int(suite.get("failures")) == sum(case.find("failure") is not None for case in cases) == 1
    assert all(case.get("classname") and case.get("name") for case in cases)


def test_junit_says_what_failed_and_by_how_much() -> None:
    judgements = [Judgement("perplexity", False, 1.5, 1.01), at_least("agreement", 0.9, 0.98)]
    verdict = build_verdict(Findings([GOOD, BAD], judgements))
    failures = {
        case.get("name"): case.find("failure").get("message")
        for case in ElementTree.fromstring(junit_xml(verdict, "out")).iter("testcase")
        if case.find("failure") is not None
    }
    assert failures == {
        "gate.perplexity": "1.5, asked for at most 1.01",
        "gate.agreement": "0.9, asked for at least 0.98",
        "integrity.slots": "model.x is all zeros",
    }
