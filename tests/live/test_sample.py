"""Samples of text are those of plain greedy decoding; speed is of a pass that nobody looks at."""

from __future__ import annotations

import torch
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text

from surgery.live.sample import PROMPT, WRITTEN, continuation, speed


def test_a_sample_is_what_greedy_generation_writes() -> None:
    live, chunk = live_of(tiny_model("llama")), tiny_text()[0]
    with one_thread(), torch.inference_mode():
        found = continuation(live, chunk)
        prompt = chunk[: min(PROMPT, len(chunk) // 2)]
        room = min(WRITTEN, len(chunk) - len(prompt))
        written = live.model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=room, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert found == {"prompt": prompt.tolist(), "written": written[0, len(prompt) :].tolist()}


def test_offloaded_weights_write_no_sample() -> None:
    live = live_of(tiny_model("llama"))
    live.model.to("meta")
    assert continuation(live, tiny_text()[0]) is None


def test_speed_is_of_the_whole_chunk() -> None:
    chunk = tiny_text()[0]
    found = speed(live_of(tiny_model("llama")), chunk)
    assert found["tokens"] == len(chunk) and found["seconds"] > 0
