"""What a model writes, and how fast it reads: for people to look at, not to judge by."""

from __future__ import annotations

import time

import torch

from .model import Live

PROMPT, WRITTEN = 48, 40  # tokens that a sample goes on from, and that it has
PASSES = 3


def continuation(live: Live, chunk: torch.Tensor) -> dict[str, list[int]] | None:
    """Token ids that greedy decoding puts after the first tokens of `chunk` (T,); None where weights are offloaded.

    There each token would fetch all weights anew. Nothing of the model's generation settings takes part.
    """
    if any(parameter.is_meta for parameter in live.model.parameters()):
        return None
    prompt = chunk[: min(PROMPT, len(chunk) // 2)]
    ids = prompt[None].to(live.device)  # (1, t)
    with torch.inference_mode():
        for _ in range(min(WRITTEN, len(chunk) - len(prompt))):
            logits = live.model(input_ids=ids, use_cache=False).logits[:, -1]  # (1, V)
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True).to(ids)], dim=1)
    return {"prompt": prompt.tolist(), "written": ids[0, len(prompt) :].tolist()}


def speed(live: Live, chunk: torch.Tensor) -> dict[str, float]:
    """Seconds that one pass over `chunk` (T,) takes by itself, the fastest of three; `tokens` in it."""
    seconds = []
    with torch.inference_mode():
        for _ in range(PASSES):
            begun = time.perf_counter()
            live.model(input_ids=chunk[None].to(live.device), use_cache=False).logits[:, -1].cpu()
            seconds.append(time.perf_counter() - begun)
    return {"tokens": len(chunk), "seconds": min(seconds)}
