"""What layers that hand on a state (mixers) make of the text, and what is left in it of the tokens that lead it.

Attention can look back at the first token from anywhere, and does (a sink). A state forgets: this says how much of what
led the text is still in what a mixer gives near it, and far from it. Block b belongs to layer b + 1, which it writes.
"""

from __future__ import annotations

from collections import Counter

import torch

from ..live.mixing import Mixing
from ..live.stream import Batch, Observer

KEYS = ("state_first", "state_rest", "lead_near", "lead_far")
NEAR = 8  # tokens at each end of a text


class States(Observer):
    """Per layer that holds a mixer, means over tokens, then over sequences:

    * `mixer`: the name of its class.
    * `state_first`, `state_rest`: L2 norm of its output at the first token of the text, and mean over all later ones.
    * `lead_near`, `lead_far`: how much of its output is due to what leads the text, |y - y'| / |y| with y' the output
      if those vectors had been zeros, over the first 8 tokens after it and over the last 8. What leads the text is the
      prefix, in front of it or remembered; in a model without one, the first token. None in shorter texts.

    The mixers compute once more for the latter, in one of `every` batches.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.turns: Counter[str] = Counter()
        self.kinds: dict[int, str] = {}
        self.found: dict[int, dict[str, tuple[float, int]]] = {}  # block -> name -> sum over sequences, and how many

    def mixed(self, block: int, mixing: Mixing, batch: Batch) -> None:
        kind = type(mixing.module)  # derived here, if it remembers a prefix
        own = (base for base in kind.__mro__ if base.__module__.startswith("transformers."))
        self.kinds[block] = next(own, kind).__name__
        output = _wide(mixing.sequence)
        norms = output[:, batch.lead :].norm(dim=-1)
        self._add(block, state_first=norms[:, 0])
        if norms.shape[1] > 1:
            self._add(block, state_rest=norms[:, 1:].mean(dim=1))
        turn = self.turns[mixing.mixer.name]
        self.turns[mixing.mixer.name] += 1
        remembers = hasattr(mixing.module, "remembered_inputs")
        lead = batch.lead or (0 if remembers else 1)
        if turn % self.every or output.shape[1] < lead + 2 * NEAR:
            return
        change = (output - _wide(mixing.without(lead))).norm(dim=-1) / output.norm(dim=-1).clamp(min=1e-30)
        text = change[:, lead:]
        self._add(block, lead_near=text[:, :NEAR].mean(dim=1), lead_far=text[:, -NEAR:].mean(dim=1))

    def _add(self, block: int, **values: torch.Tensor) -> None:
        found = self.found.setdefault(block, {})
        for name, of_each in values.items():
            total, count = found.get(name, (0.0, 0))
            found[name] = total + of_each.double().sum().item(), count + len(of_each)

    def rows(self) -> dict[int, dict]:
        """Layer -> the keys above; of two mixers in a block, their mean."""
        return {
            block + 1: {
                "mixer": self.kinds[block],
                **{name: found[name][0] / found[name][1] if name in found else None for name in KEYS},
            }
            for block, found in sorted(self.found.items())
        }


def _wide(sequence: torch.Tensor) -> torch.Tensor:
    return sequence.to(torch.promote_types(sequence.dtype, torch.float32))
