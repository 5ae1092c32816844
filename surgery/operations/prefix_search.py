"""Choose the prefix to fold: no massive activations left on the calibration text, then the lowest perplexity.

What a fold leaves, it leaves near the start of a text, where a token that could be a sink finds none yet. So candidates
race on short openings, cut from all over the calibration text, and on texts that begin with each candidate token: first
on a few, then those that leave least on all, and never deeper than massive activations are born. What leaves nothing is
ranked by its perplexity on a few long chunks; and the best that leaves nothing on all openings and chunks is taken.

All candidates of a round are tried in one pass over the weights. Nothing is written.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import SourceError
from ..live.graft import folds, grafted
from ..live.likelihood import Likelihood
from ..live.model import Live
from ..live.score import Score
from ..live.stream import Reading, read, stream
from ..live.text import token_texts, tokenize
from ..progress import Advance, unseen
from ..survey.across import AutoMassive
from ..survey.massive import MassiveActivations

OPENINGS, OPENING = 128, 32  # short texts to screen on, and their tokens
RACED = 32  # of them that every candidate is tried on
QUICK_CHUNKS = 8  # long chunks on which the prefixes that pass the screen are ranked
SCORED, CONFIRMED = 4, 2  # prefixes of one length that are ranked, and confirmed on all calibration chunks
PARENTS = 2  # prefixes of one length that are extended by a token
FROM_SURVEY = 4  # candidate tokens taken from the survey: those that carry the most massive activations


@dataclass(frozen=True)
class Trial:
    """One prefix as tried: massive activations left on so many `openings` and long `chunks`, and perplexity.

    `loudest` is the largest |x| / median left on openings, of the loudest layer: it ranks prefixes that leave none.
    `confirmed`: whether all openings and chunks were looked at.
    """

    prefix: tuple[int, ...]
    on_openings: int
    openings: int
    loudest: float
    on_chunks: int = 0
    chunks: int = 0
    score: Score | None = None
    confirmed: bool = False

    @property
    def massive(self) -> int:
        return self.on_openings + self.on_chunks

    @property
    def rank(self) -> tuple[float, float, int, float]:
        """By massive activations for each text that was tried."""
        nll = self.score.nll if self.score is not None else math.inf
        left = self.on_openings / max(self.openings, 1) + self.on_chunks / max(self.chunks, 1)
        return (left, nll, len(self.prefix), self.loudest)


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
        pool = self.pool
        if not pool:
            raise SourceError("prefix: auto found no candidate token in this vocabulary; list the prefix in the recipe")
        parents: list[tuple[int, ...]] = [()]
        for length in range(1, min(max_slots, len(pool)) + 1):
            grown = [(*parent, token) for parent in parents for token in pool if token not in parent]
            screened = self._screen(grown)
            clean = [trial for trial in screened if trial.massive == 0 and trial.openings == len(self.openings)]
            # What fails the screen is not worth scoring, unless there will be nothing longer to score.
            if clean or length in (max_slots, len(pool)):
                if self._confirm(clean or screened).massive == 0:
                    break
            parents = [trial.prefix for trial in screened[:PARENTS]]
        return min((trial for trial in self.trials.values() if trial.confirmed), key=lambda trial: trial.rank)

    def _screen(self, prefixes: Sequence[tuple[int, ...]]) -> list[Trial]:
        """`prefixes` as tried, best first; all openings are for those that leave nothing on the first of them."""
        openings = self.openings
        some = openings[torch.linspace(0, len(openings) - 1, min(RACED, len(openings))).long()]
        tried = {trial.prefix: trial for trial in self._left(prefixes, some, f"{len(some)} openings")}
        ahead = [trial.prefix for trial in sorted(tried.values(), key=lambda trial: trial.rank) if not trial.massive]
        clean = 0
        while ahead and clean < SCORED:
            few, ahead = ahead[:SCORED], ahead[SCORED:]
            for trial in self._left(few, openings, f"{len(openings)} openings"):
                tried[trial.prefix] = trial
                clean += trial.massive == 0
        self.trials.update(tried)
        return sorted(tried.values(), key=lambda trial: (trial.rank[0], -trial.openings, trial.rank))

    def _left(self, prefixes: Sequence[tuple[int, ...]], rows: torch.Tensor, what: str) -> list[Trial]:
        """A trial of each of `prefixes`: what it leaves on openings `rows`, as deep as massive activations are born."""
        left = [MassiveActivations() for _ in prefixes]
        self._pass(prefixes, rows, [[one] for one in left], what, self.depth)
        return [Trial(prefix, one.count, len(rows), one.loudest) for prefix, one in zip(prefixes, left, strict=True)]

    def _confirm(self, trials: Sequence[Trial]) -> Trial:
        """The first of the best of `trials` that leaves nothing on any text, or else the best of them."""
        ranked = sorted(self._scored(trials[:SCORED]), key=lambda trial: trial.rank)
        for trial in ranked[:CONFIRMED]:
            self.trials[trial.prefix] = confirmed = self._confirmed(trial)
            if confirmed.massive == 0:
                return confirmed
        return min((self.trials[trial.prefix] for trial in ranked[:CONFIRMED]), key=lambda trial: trial.rank)

    def _scored(self, trials: Sequence[Trial]) -> list[Trial]:
        """`trials` with perplexity, and what they leave, on a few chunks."""
        chunks = self.chunks[:QUICK_CHUNKS]
        left, likelihoods = [MassiveActivations() for _ in trials], [Likelihood() for _ in trials]
        observers = [list(pair) for pair in zip(left, likelihoods, strict=True)]
        self._pass([trial.prefix for trial in trials], chunks, observers, f"{len(chunks)} chunks")
        scored = [
            replace(trial, on_chunks=one.count, chunks=len(chunks), score=likelihood.score)
            for trial, one, likelihood in zip(trials, left, likelihoods, strict=True)
        ]
        self.trials.update({trial.prefix: trial for trial in scored})
        return scored

    def _confirmed(self, trial: Trial) -> Trial:
        """`trial` after all openings in all layers, and after all chunks up to where massive activations are born."""
        rest = self.chunks[trial.chunks :]
        on_rest, on_openings = MassiveActivations(), MassiveActivations()
        self._pass([trial.prefix], self.openings, [[on_openings]], f"{len(self.openings)} openings, all layers")
        if len(rest):
            self._pass([trial.prefix], rest, [[on_rest]], f"{len(rest)} more chunks", self.depth)
        return replace(
            trial, on_openings=on_openings.count, on_chunks=trial.on_chunks + on_rest.count, chunks=len(self.chunks),
            confirmed=True,
        )  # fmt: skip

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
    def depth(self) -> int:
        """The layer after which no more massive activations are born in the bare model: what leaves none there will
        hardly have any later. All layers where the survey saw none."""
        counts = {layer: tally.count for layer, tally in self._survey[0].layers.items()}
        most = max(counts.values(), default=0)
        return min(
            (layer for layer, count in counts.items() if count == most > 0), default=len(self.live.anatomy.blocks)
        )

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

    def _pass(
        self, prefixes: Sequence[tuple[int, ...]], rows: torch.Tensor, observers: Sequence[list[Any]], what: str,
        depth: int | None = None,
    ) -> None:  # fmt: skip
        """Feed `rows` to the model with each of `prefixes` folded, and show it to the observers of that prefix."""
        found = folds(self.live, prefixes, self.visible)
        readings = [
            Reading(rows, watching, graft=functools.partial(grafted, fold=fold), depth=depth,
                    what=f"{self.shown(fold.prefix)} on {what}")
            for fold, watching in zip(found, observers, strict=True)
        ]  # fmt: skip
        read(self.live, readings, lambda count, what: self.advance(0, what))
        self.advance(len(prefixes), readings[-1].what)

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
                    "confirmed": trial.confirmed,
                    "ppl": trial.score.ppl if trial.score is not None else None,
                }
                for trial in sorted(
                    self.trials.values(), key=lambda trial: (not trial.confirmed, -trial.chunks, trial.rank)
                )
            ],
        }


def _any(sun: MassiveActivations, scale_free: AutoMassive) -> bool:
    return sun.count > 0 or any(scale_free.counts.values())
