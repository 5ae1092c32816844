"""An error is one sentence of a length that a person reads, whatever a file has put into it."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from surgery.errors import LONGEST_SENTENCE, LONGEST_WORD, DamagedCheckpoint, shortened


@given(st.text(max_size=LONGEST_SENTENCE))
def test_a_sentence_of_usual_length_stays_as_it_is(text: str) -> None:
    if all(len(word) <= LONGEST_WORD for word in text.split(" ")):
        assert shortened(text) == text


@given(st.lists(st.text(alphabet="ab [],", max_size=3000), max_size=5))
@example(["a" * 100_000])
@example(["[0, 1, 2]" * 100_000])
def test_no_sentence_is_longer_than_what_is_read(parts: list[str]) -> None:
    said = str(DamagedCheckpoint(f"model.safetensors: {' '.join(parts)} is damaged; download it again."))
    assert len(said) <= LONGEST_SENTENCE
    assert said.startswith("model.safetensors: ") and said.endswith(" is damaged; download it again.")
