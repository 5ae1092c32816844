"""Requests to a model with slots begin with placeholders, or are refused before they reach the engine.

vLLM has no entry point that sees the token ids of a request, so its InputProcessor, through which every request of
LLM and of the server goes, is wrapped. A request that comes another way meets a stray's value (`slots.LOUD`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .names import ENTRY


def guard(processor: Any) -> None:
    """Let the method `process_inputs` of vLLM's InputProcessor check what it returns. Safe to call twice."""
    if not hasattr(processor.process_inputs, "__wrapped__"):
        processor.process_inputs = _checked(processor.process_inputs)


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = method(self, *args, **kwargs)
        entry = getattr(self.model_config.hf_config, ENTRY, None)
        if entry is not None:
            require_placeholders(request.prompt_token_ids, entry["placeholder_ids"])
        return request

    return process_inputs


def require_placeholders(ids: Sequence[int] | None, placeholders: Sequence[int]) -> None:
    """ValueError (to a client of the server, 400) unless `ids` are the placeholders and then a text."""
    n_slots = len(placeholders)
    if ids is None or list(ids[:n_slots]) != list(placeholders):
        raise ValueError(
            f"prompts of this model begin with the token ids {list(placeholders)}, which its tokenizer and its chat "
            "template put there; send text with add_special_tokens, or a chat, or begin your own ids with them."
        )
    if len(ids) == n_slots:
        raise ValueError("the prompt is empty, and this model cannot begin from nothing; give it a first token.")
