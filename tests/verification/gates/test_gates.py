"""What holds of every gate, whichever are added."""

from __future__ import annotations

import pytest
from helpers.measured import measured

from surgery.live.paired import share_interval
from surgery.live.score import Score
from surgery.verification.gates import GATES, SHOWN, Gate
from surgery.verification.verify import Verify


def test_each_has_a_key_of_its_own_in_recipes() -> None:
    assert [gate.name for gate in GATES] == list(Verify.model_fields)
    assert {*SHOWN} == {*GATES} and len(SHOWN) == len(GATES)
    for port in ("text", "images"):
        always = [gate.name for gate in GATES if gate.always and gate.reading in (None, port)]
        assert [gate.name for gate in Verify().of(port).gates()] == always


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_a_key_without_default_has_an_example(gate: type[Gate]) -> None:
    """Of which an error says what to write."""
    required = [field for field in gate.model_fields.values() if field.is_required()]
    assert all(field.examples for field in required)
    if gate.always:
        assert not required


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_of_what_was_not_measured_there_is_nothing_to_show(gate: type[Gate]) -> None:
    for verdict in ({}, {gate.name: None}):
        assert gate.table(verdict) is None and gate.sentence(verdict) is None


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_a_judgement_has_a_name_in_words(gate: type[Gate]) -> None:
    for judgement in (gate.name, f"{gate.name}.what"):
        assert " " in gate.label(judgement) and "_" not in gate.label(judgement)


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate.always], ids=lambda gate: gate.name)
def test_those_that_always_apply_do_without_the_original(gate: type[Gate]) -> None:
    after = measured(converted=Score((1.0, 2.0), 1))
    assert all(judgement.name == gate.name for judgement in gate().judge(None, after))
    assert isinstance(gate().found(None, after, None), dict)


def test_a_share_is_bounded_by_how_many_agree() -> None:
    """One that differs never gives a higher bound than none."""
    for count in (2, 16, 64, 256):
        lows = [share_interval([True] * same + [False] * (count - same)).low for same in range(count + 1)]
        assert lows == sorted(lows) and len(set(lows)) == len(lows) and lows[0] == 0
    found = share_interval([True] * 63 + [False])  # Wilson's, by an independent hand
    assert (round(found.low, 4), round(found.high, 4)) == (0.9167, 0.9972)
