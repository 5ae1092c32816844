"""The seam: each attention site of a transformers model asks `ALL_ATTENTION_FUNCTIONS` for its function, then calls it.

`observing` stands at that point. It changes nothing about which function or which mask a model gets; it sees each call
and, where asked, what came of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Call:
    """One attention call: query (B, Hq, T, D), key (B, H, S, D), value (B, H, S, E), after rotary and norms.

    `lse` (B, Hq, T), once the call is computed and if a kernel found it: logsumexp over the keys of each query's logits
    (slots and learned sink logits left out). `summed` (B, T, Hq, E), once the call is computed and if the site has a
    head norm: the heads' sums of values before it.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict = field(default_factory=dict)
    lse: torch.Tensor | None = None
    summed: torch.Tensor | None = None

    @property
    def causal(self) -> bool:
        """Whether a query sees no later key, where there is no mask that says so."""
        said = self.arguments.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if said is None else said)

    def of_row(self, row: int) -> Call:
        """The call of one sequence alone."""

        def one(tensor: torch.Tensor | None) -> torch.Tensor | None:  # some are the same for all sequences
            return tensor if tensor is None or len(tensor) == 1 else tensor[row : row + 1]

        arguments = {**self.arguments}
        if "logit_bias" in arguments:
            arguments["logit_bias"] = one(arguments["logit_bias"])
        part = slice(row, row + 1)
        return Call(self.module, self.query[part], self.key[part], self.value[part], one(self.mask), arguments)

    @property
    def scale(self) -> float:
        scaling = self.arguments.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling


@contextlib.contextmanager
def observing(
    observe: Callable[[Call], None] | None,
    attended: Callable[[Call, torch.Tensor], None] | None = None,
    *,
    compute: bool = True,
) -> Iterator[None]:
    """While active, `observe` sees every attention call in this process, before it is computed.

    `attended` sees the call again once it is computed, with its output (B, T, Hq, E): the heads' sums of values, normed
    where the site has a head norm, before the output projection. Either may be None. With `compute=False` attention is
    left out and gives an empty tensor of the right shape, for the meta device; nothing is attended then.
    """

    def wrap(attend: Callable) -> Callable:
        def attention(module, query, key, value, attention_mask=None, **arguments):
            call = Call(module, query, key, value, attention_mask, arguments)
            if observe is not None:
                observe(call)
            if not compute:
                batch, heads, length = query.shape[:3]
                return query.new_empty(batch, length, heads, value.shape[-1]), None
            if attended is None:
                return attend(module, query, key, value, attention_mask, **arguments)
            with _Listening() as heard, _before_norm(module) as summed:
                result = attend(module, query, key, value, attention_mask, **arguments)
            lse = heard.lse_over(key.shape[2])
            attended(replace(call, lse=lse, summed=summed[0] if summed else None), result[0])
            return result

        return attention

    with _interposed(wrap):
        yield


@contextlib.contextmanager
def _before_norm(site: Any) -> Iterator[list[torch.Tensor]]:
    """Holds what enters the head norm of `site` meanwhile; stays empty where it has none."""
    entered: list[torch.Tensor] = []
    with contextlib.ExitStack() as undo:
        if hasattr(site, "head_norm"):
            hook = site.head_norm.register_forward_pre_hook(lambda norm, args: entered.append(args[0]))
            undo.callback(hook.remove)
        yield entered


@contextlib.contextmanager
def rewriting(change: Callable[[Call], Call]) -> Iterator[None]:
    """While active, every attention call in this process is computed as `change` of it.

    Of its fields, query, key, value and mask count. What begins to observe meanwhile sees the changed call.
    """

    def wrap(attend: Callable) -> Callable:
        def attention(module, query, key, value, attention_mask=None, **arguments):
            call = change(Call(module, query, key, value, attention_mask, arguments))
            return attend(module, call.query, call.key, call.value, call.mask, **arguments)

        return attention

    with _interposed(wrap):
        yield


@contextlib.contextmanager
def _interposed(wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """While active, a site that asks for its attention function gets `wrap` of it; the first to come stands outside."""
    before = vars(ALL_ATTENTION_FUNCTIONS).get("get_interface")
    ask = type(ALL_ATTENTION_FUNCTIONS).get_interface.__get__(ALL_ATTENTION_FUNCTIONS)
    wraps = [*getattr(before, "wraps", ()), wrap]

    def interface(name, default):
        attend = ask(name, default)
        for wrap in reversed(wraps):
            attend = wrap(attend)
        return attend

    functions: Any = ALL_ATTENTION_FUNCTIONS
    functions.get_interface = interface
    functions.get_interface.wraps = wraps
    try:
        yield
    finally:
        if before is None:
            del functions.get_interface  # the instance attribute; the class's method is back
        else:
            functions.get_interface = before


class _Listening(TorchDispatchMode):
    """Keeps what the CPU's flash kernel knows and its callers drop, the log-sum-exp; every operation runs as it would.

    torch.nn.functional.scaled_dot_product_attention discards it, and so does the merged path of sites with slots.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, torch.Tensor]] = []  # number of keys, log-sum-exp

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if function is aten.scaled_dot_product_attention.default:  # in inference mode it arrives in one piece
            with self:
                return function.decompose(*args, **kwargs)
        result = function(*args, **kwargs)
        if function is aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.calls.append((args[1].shape[2], result[1]))
        return result

    def lse_over(self, keys: int) -> torch.Tensor | None:
        """The log-sum-exp (B, Hq, T), if attention was one call of the kernel over so many keys."""
        return self.calls[0][1] if [count for count, _ in self.calls] == [keys] else None
