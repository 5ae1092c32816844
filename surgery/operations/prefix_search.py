"""Choose the prefix to fold: no massive activations left on the calibration text, then the lowest perplexity.

What a fold leaves, it leaves near the start of a text, where a token that could be a sink finds none yet. So candidates
are first screened on many short openings, cut from all over the calibration text, and on texts that begin with each
candidate token; those that leave nothing are scored on long chunks. A trial costs one forward pass of the prefix and
one of its text; nothing is written.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import SourceError
from ..live.graft import fold, grafted
from ..live.likelihood import Likelihood
from ..live.model import Live
from ..live.score import Score
from ..live.stream import Observer, stream
from ..live.text import token_texts, tokenize
from ..progress import Advance, unseen
from ..survey.across import AutoMassive
from ..survey.massive import MassiveActivations

OPENINGS, OPENING = 128, 32  # short texts to screen on, and their tokens
QUICK_CHUNKS = 8  # long chunks on which the prefixes that pass the screen are ranked
SCORED, CONFIRMED = 4, 2  # prefixes of one length that are ranked, and confirmed on all calibration chunks
PARENTS = 2  # prefixes of one length that are extended by a token
FROM_SURVEY = 4  # candidate tokens taken from the survey: those that carry the most massive activations


@dataclass(frozen=True)
class Trial:
    """One prefix as tried: massive activations left on openings and on long chunks, and perplexity on the latter.

    `loudest` is the largest |x| / median left on openings, of the loudest layer: it ranks prefixes that leave none.
    """

    prefix: tuple[int, ...]
    on_openings: int
    loudest: float
    on_chunks: int = 0
    score: Score | None = None

    @property
    def massive(self) -> int:
        return self.on_openings + self.on_chunks

    @property
    def chunks(self) -> int:
        return len(self.score.chunks) if self.score is not None else 0

    @property
    def rank(self) -> tuple[int, float, int, float]:
        nll = self.score.nll if self.score is not None else float("inf")
        return (self.massive, nll, len(self.prefix), self.loudest)


class PrefixSearch:
    """Candidates from the survey of the bare model, grown one token at a time from the best prefixes so far.

    chunks: (N, T) of calibration text. The search is deterministic.
    """

    def __init__(
        self,
        live: Live,
        tokenizer: PreTrainedTokenizerBase,
        chunks: torch.Tensor,
        visible: str,
        advance: Advance = unseen,
    ):
        self.live, self.tokenizer, self.chunks = live, tokenizer, chunks
        self.visible, self.advance = visible, advance
        self.trials: dict[tuple[int, ...], Trial] = {}

    def run(self, max_slots: int) -> Trial:
        """The best prefix of 1..max_slots tokens, stopping at the first length that leaves no massive activation."""
        pool, openings = self.pool, self.openings
        if not pool:
            raise SourceError("prefix: auto found no candidate token in this vocabulary; list the prefix in the recipe")
        parents: list[tuple[int, ...]] = [()]
        for length in range(1, min(max_slots, len(pool)) + 1):
            grown = [(*parent, token) for parent in parents for token in pool if token not in parent]
            screened = sorted((self._screen(prefix, openings) for prefix in grown), key=lambda trial: trial.rank)
            clean = [trial for trial in screened if trial.on_openings == 0]
            # What fails the screen is not worth scoring, unless there will be nothing longer to score.
            if clean or length in (max_slots, len(pool)):
                if self._confirm(clean or screened)[0].massive == 0:
                    break
            parents = [trial.prefix for trial in screened[:PARENTS]]
        confirmed = [trial for trial in self.trials.values() if trial.chunks == len(self.chunks)]
        return min(confirmed, key=lambda trial: trial.rank)

    def _confirm(self, trials: Sequence[Trial]) -> list[Trial]:
        """The best of `trials` on all calibration chunks, best first; the others fall behind on a few of them."""
        scored = sorted((self._score(trial, QUICK_CHUNKS) for trial in trials[:SCORED]), key=lambda trial: trial.rank)
        finalists = [self._score(trial, len(self.chunks)) for trial in scored[:CONFIRMED]]
        return sorted(finalists, key=lambda trial: trial.rank)

    def finds_any(self) -> bool:
        """Whether the bare model has massive activations, by Sun's criterion or the scale-free one.

        On the long chunks that are surveyed, or on openings: some models have them only on a BOS.
        """
        if _any(*self._survey):
            return True
        self.advance(1, f"the original on {len(self.openings)} openings")
        found = MassiveActivations(), AutoMassive()
        stream(self.live, self.openings, found)
        return _any(*found)

    @functools.cached_property
    def _survey(self) -> tuple[MassiveActivations, AutoMassive]:
        """Of the bare model, on a few long chunks."""
        self.advance(1, "survey of the original")
        found = MassiveActivations(), AutoMassive()
        stream(self.live, self.chunks[:QUICK_CHUNKS], found)
        return found

    @functools.cached_property
    def pool(self) -> list[int]:
        """Token ids worth folding: BOS, EOS, newline, space, and what carries massive activations in the text."""
        later: collections.Counter[int] = collections.Counter()
        for tally in self._survey[0].layers.values():
            later.update(+tally.later_tokens)  # the plus drops tokens counted zero times
        tokenizer = self.tokenizer
        named = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        for text in ("\n", " ", ".", " the"):
            ids = tokenize(tokenizer, text)
            named += ids if len(ids) == 1 else []
        pool = [token for token in named if token is not None] + [token for token, _ in later.most_common(FROM_SURVEY)]
        return list(dict.fromkeys(pool))

    @functools.cached_property
    def texts(self) -> dict[int, str]:
        """Each token of the pool as text."""
        return dict(zip(self.pool, token_texts(self.tokenizer, self.pool), strict=True))

    @functools.cached_property
    def openings(self) -> torch.Tensor:
        """(len(pool) + OPENINGS, OPENING): texts that begin with each candidate, and cuts from all over."""
        pool, flat = self.pool, self.chunks.flatten()
        length = min(OPENING, self.chunks.shape[1])
        starts = torch.linspace(0, len(flat) - length, min(OPENINGS, len(flat) // length)).long()
        cuts = torch.stack([flat[start : start + length] for start in starts])
        begun = cuts[torch.arange(len(pool)) % len(cuts)].roll(1, dims=1)
        begun[:, 0] = torch.tensor(pool, dtype=torch.long)
        return torch.cat([begun, cuts])

    def _screen(self, prefix: tuple[int, ...], openings: torch.Tensor) -> Trial:
        if prefix not in self.trials:
            self.advance(1, f"{self.shown(prefix)} on {len(openings)} openings")
            left = MassiveActivations()
            self._pass(prefix, openings, [left])
            self.trials[prefix] = Trial(prefix, left.count, left.loudest)
        return self.trials[prefix]

    def _score(self, trial: Trial, count: int) -> Trial:
        count = min(count, len(self.chunks))
        if trial.chunks < count:
            self.advance(1, f"{self.shown(trial.prefix)} on {count} chunks")
            left, likelihood = MassiveActivations(), Likelihood()
            self._pass(trial.prefix, self.chunks[:count], [left, likelihood])
            trial = Trial(
                trial.prefix,
                trial.on_openings,
                trial.loudest,
                left.count,
                likelihood.score,
            )
            self.trials[trial.prefix] = trial
        return trial

    def _pass(self, prefix: tuple[int, ...], rows: torch.Tensor, observers: Sequence[Observer]) -> None:
        with grafted(self.live, fold(self.live, prefix, self.visible)):
            stream(self.live, rows, observers)

    def shown(self, prefix: Sequence[int]) -> str:
        return " ".join(repr(self.texts[token]) for token in prefix)

    def to_dict(self) -> dict[str, Any]:
        """What was tried, best first among those scored on the most text: `prefix_search` of the verdict."""
        return {
            "objective": "fewest massive activations on the calibration text, then lowest perplexity, "
            "then fewest slots",
            "tried": [
                {
                    "prefix_ids": list(trial.prefix),
                    "tokens": [self.texts[token] for token in trial.prefix],
                    "massive_activations": {
                        "openings": trial.on_openings,
                        "chunks": trial.on_chunks if trial.chunks else None,
                    },
                    "chunks": trial.chunks,
                    "ppl": trial.score.ppl if trial.score is not None else None,
                }
                for trial in sorted(self.trials.values(), key=lambda trial: (-trial.chunks, trial.rank))
            ],
        }


def _any(sun: MassiveActivations, scale_free: AutoMassive) -> bool:
    return sun.count > 0 or any(scale_free.counts.values())
