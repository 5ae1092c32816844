"""How what is tuned is judged: on what was held out, as it would be emitted, quantised if settings say so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..live.features import Features
from ..live.likelihood import scored
from ..live.model import Live
from ..live.quantised import activation_ranges, quantised
from ..live.stream import stream
from .adapted import Adapted
from .corpus import Corpus
from .settings import Settings


@contextlib.contextmanager
def _as_emitted(live: Live, adapted: Adapted, settings: Settings, corpus: Corpus) -> Iterator[None]:
    with contextlib.ExitStack() as inside:
        inside.enter_context(adapted.merged())
        if (scheme := settings.scheme) is not None:
            ranges = activation_ranges(live, corpus.scaling) if scheme.calibrated else None
            inside.enter_context(quantised(live, scheme, ranges))
        yield


def held_out_nll(live: Live, adapted: Adapted, settings: Settings, corpus: Corpus) -> float:
    """NLL of the held-out text in nats per token."""
    with _as_emitted(live, adapted, settings, corpus):
        return scored(live, corpus.held_out).nll


def held_out_distance(
    live: Live, adapted: Adapted, settings: Settings, corpus: Corpus, original: Features
) -> float:  # fmt: skip
    """How far an encoder's features of the held-out images are from those of the `original`: `Features.distance`."""
    found = Features(live)
    with _as_emitted(live, adapted, settings, corpus):
        stream(live, corpus.held_out, [found])
    return found.distance(original)


def original_features(live: Live, adapted: Adapted, corpus: Corpus) -> Features:
    """The original's features of the held-out images, in float."""
    found = Features(live)
    with adapted.teaching():
        stream(live, corpus.held_out, [found])
    return found
