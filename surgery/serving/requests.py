"""Requests to a model with slots begin with placeholders, or are refused before they reach the engine.

vLLM has no entry point that sees the token ids of a request, so its InputProcessor, through which every request of
LLM and of the server goes, is wrapped. A request that comes another way meets a stray's value (`slots.LOUD`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .names import ENTRY


def guard(processor: Any, refusal: Callable[[str], Exception]) -> None:
    """Let the method `process_inputs` of vLLM's InputProcessor check what it returns. Safe to call twice.

    `refusal` makes the exception of a sentence: one that the server answers with 400.
    """
    if not hasattr(processor.process_inputs, "__wrapped__"):
        processor.process_inputs = _checked(processor.process_inputs, refusal)


def _checked(method: Callable[..., Any], refusal: Callable[[str], Exception]) -> Callable[..., Any]:
    @functools.wraps(method)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = method(self, *args, **kwargs)
        entry = getattr(self.model_config.hf_config, ENTRY, None)
        why = None if entry is None else fault(request.prompt_token_ids, entry["placeholder_ids"])
        if why is not None:
            raise refusal(why)
        return request

    return process_inputs


def fault(ids: Sequence[int] | None, placeholders: Sequence[int]) -> str | None:
    """What is wrong with a prompt of token ids, in a sentence; None where it is the placeholders and then a text."""
    n_slots = len(placeholders)
    if ids is None or list(ids[:n_slots]) != list(placeholders):
        return (
            f"prompts of this model begin with the token ids {list(placeholders)}, which its tokenizer and its chat "
            "template put there; send text with add_special_tokens, or a chat, or begin your own ids with them."
        )
    if len(ids) == n_slots:
        return "the prompt is empty, and this model cannot begin from nothing; give it a first token."
    return None
