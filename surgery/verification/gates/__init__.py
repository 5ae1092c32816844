"""Gates: what a recipe asks of the converted model, one file each; see `base` for what a gate is and how to add one."""

from __future__ import annotations

from .agreement import Agreement
from .base import Gate
from .cache_edits import CacheEdits
from .equivalence import Equivalence
from .fidelity import Fidelity
from .massive_activations import MassiveActivations
from .neighbours import Neighbours
from .perplexity import Perplexity
from .quantised import Quantised
from .quantised_features import QuantisedFeatures
from .streaming import Streaming
from .tasks import Tasks
from .top1 import Top1

# In the order in which they are measured and judged.
GATES: tuple[type[Gate], ...] = (
    Equivalence, Perplexity, Agreement, Quantised, Streaming, CacheEdits, Tasks,
    Fidelity, Neighbours, Top1, QuantisedFeatures, MassiveActivations,
)  # fmt: skip
# In the order in which a verdict shows them: what always applies first.
SHOWN = tuple(sorted(GATES, key=lambda gate: not gate.always))

__all__ = ["GATES", "SHOWN", "Gate"]
