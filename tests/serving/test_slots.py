"""Which tokens take a slot, and which heads a rank keeps, by hand."""

from __future__ import annotations

import pytest
import torch

from surgery.serving.requests import fault, guard
from surgery.serving.slots import LOUD, TEXT, fill_keys, fill_values, local_heads, replaced, rows_of

PLACEHOLDERS = torch.tensor([7, 8])


def test_rows_are_slots_text_or_strays() -> None:
    # Two requests begin, one of them with a wrong second id; one goes on, and its text may hold any id.
    ids = torch.tensor([7, 8, 5, 7, 9, 5, 7, 8])
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 30, 31])
    assert rows_of(ids, positions, PLACEHOLDERS).tolist() == [0, 1, TEXT, 0, 2, TEXT, TEXT, TEXT]


def test_order_of_placeholders_counts() -> None:
    assert rows_of(torch.tensor([8, 7]), torch.tensor([0, 1]), PLACEHOLDERS).tolist() == [2, 2]


@pytest.mark.parametrize("flat", [False, True])
def test_only_rows_are_replaced(flat: bool) -> None:
    states, table = torch.randn(5, 2, 3), torch.randn(3, 2, 3)
    rows = torch.tensor([1, TEXT, 2, TEXT, 0, 0, 0])  # of a longer buffer
    found = replaced(states.flatten(1) if flat else states, table, rows)
    expected = torch.stack([table[1], states[1], table[2], states[3], table[0]])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("heads", "ranks", "kept"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (4, 4, [[0], [1], [2], [3]]),
        (2, 4, [[0], [0], [1], [1]]),  # more ranks than heads: neighbours share one
        (1, 4, [[0], [0], [0], [0]]),
    ],
)
def test_heads_are_cut_by_rank(heads: int, ranks: int, kept: list[list[int]]) -> None:
    slots = torch.arange(heads).float().view(1, heads, 1).expand(2, heads, 3)
    found = [local_heads(slots, max(1, heads // ranks), rank, ranks)[0, :, 0].tolist() for rank in range(ranks)]
    assert found == kept


def test_a_layer_that_is_on_all_ranks_keeps_all() -> None:
    slots = torch.randn(2, 4, 3)
    assert torch.equal(local_heads(slots, 4, 1, 2), slots)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match="3 key/value heads in the checkpoint, and 2 on each"):
        local_heads(torch.randn(1, 3, 2), 2, 0, 2)


def test_slots_fill_all_rows_but_the_last() -> None:
    slots, table = torch.randn(2, 4, 6), torch.full((3, 2, 6), torch.nan)
    fill_keys(table, slots, 1, 2)
    assert torch.equal(table[:2], slots[:, 2:]) and torch.equal(table[2], slots[0, 2:])
    fill_values(table, slots, 0, 2)
    assert torch.equal(table[:2], slots[:, :2])
    assert table[2].abs().eq(LOUD).all() and table[2].sum() == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        fill_keys(torch.empty(3, 2, 6), torch.randn(1, 4, 6), 0, 2)
    with pytest.raises(ValueError, match="not a finite number"):
        fill_keys(torch.empty(2, 2, 6), torch.full((1, 2, 6), torch.nan), 0, 1)


# ---- requests


def test_requests_begin_with_placeholders() -> None:
    assert fault([7, 8, 5], [7, 8]) is None
    for ids in ([5, 7, 8], [7, 5, 8], [7], [], None):
        assert "begin with the token ids [7, 8]" in str(fault(ids, [7, 8]))
    assert "prompt is empty" in str(fault([7, 8], [7, 8]))


def test_other_models_are_let_through() -> None:
    class Request:
        prompt_token_ids = (1, 2)

    class Config:
        hf_config = object()

    class Processor:
        model_config = Config()

        def process_inputs(self, request_id: str) -> type[Request]:
            return Request

    guard(Processor, LookupError)
    wrapped = Processor.process_inputs
    guard(Processor, LookupError)
    assert Processor.process_inputs is wrapped, "wrapped once"
    assert Processor().process_inputs("a") is Request
    Config.hf_config = type("Served", (), {"served_slots": {"placeholder_ids": [1]}})
    assert Processor().process_inputs("a") is Request
    Request.prompt_token_ids = (2, 1)
    with pytest.raises(LookupError, match="begin with"):
        Processor().process_inputs("a")
