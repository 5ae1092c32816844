"""`surgery pretrain`: a small model from nothing, in variants, and curves of what becomes of its sinks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..anatomy.quiet import quiet
from ..checkpoint.disk import require_target
from ..checkpoint.stage import Stage
from ..endings.leftovers import clear_for
from ..errors import SourceError
from ..live.text import Files, files, read_texts
from ..progress import SILENT, Reporter
from ..recipe.file import read
from ..report.training import training_curves
from ..results import Pretrained
from ..tuning.corpus import Corpus, make_corpus
from ..tuning.scratch.loop import train
from ..tuning.scratch.settings import FromScratch, Pretrain
from ..tuning.scratch.tokenizer import as_pretrained, train_tokenizer
from ..tuning.scratch.variants import Variant, base_config, build, initial_weights
from ..tuning.tune import make_accelerator
from ..verification.verdict import plain_json
from ..version import VERSION
from ..words import count_of, human

CURVES = "curves"


def pretrain(
    recipe: FromScratch | Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    text: Files,
    held_out: Files = (),
    reporter: Reporter = SILENT,
) -> Pretrained:
    """Train the variants that `recipe` names on `text`, write them and their curves to the new directory `out`.

    They are judged on `held_out`, or else on the first sequences of `text`, which are then not trained on. `out` holds
    a checkpoint of each variant, by its name, with its tokenizer; curves.json, which is what is returned; and
    curves.png and curves.svg. Raises SourceError for text that is too short and for a loss that is not a number.
    """
    recipe = read(recipe, FromScratch)
    out, settings = Path(out), recipe.pretrain
    require_target(out)
    for left in clear_for(out):
        reporter.note(f"removed {left.path} ({human(left.bytes)}), which a run that was killed had left")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SourceError("pretrain runs in one process; start it without accelerate launch.")
    if not (text := files(text)):
        raise SourceError("pretraining needs text to train on: give --text FILE.")
    words, other = read_texts(text), read_texts(files(held_out)) if held_out else None
    reporter.step("train a tokenizer")
    tokenizer = train_tokenizer(words, settings.vocabulary)
    corpus = _corpus(tokenizer, words, other, settings)
    config = base_config(settings, tokenizer.get_vocab_size())
    weights = initial_weights(config, settings.seed)
    reporter.note(f"{count_of(sum(weight.numel() for weight in weights.values()), 'parameter')} in the plain model")
    variants: dict[str, dict[str, Any]] = {}
    with Stage(out) as stage:
        for name in settings.variants:
            reporter.step(f"train {name}")
            variant = build(name, config, weights, slots=settings.slots, seed=settings.seed)
            with reporter.bar("training", settings.steps) as advance:
                curves = train(variant, settings, corpus, make_accelerator("cpu"), advance)
            variants[name] = {"parameters": variant.model.num_parameters(), **curves}
            _save(variant, as_pretrained(tokenizer, leading=bool(variant.lead)), stage.path / name)
        result = plain_json(
            {
                "surgery": VERSION,
                "recipe": recipe.to_dict(),
                "vocabulary": tokenizer.get_vocab_size(),
                "training_tokens": corpus.training.numel(),
                "text_sha256": corpus.sha256,
                "variants": variants,
            }
        )
        stage.add_json(f"{CURVES}.json", result)
        training_curves(variants, stage.path / CURVES)
        stage.publish()
    return result


def _corpus(tokenizer: Tokenizer, words: str, other: str | None, settings: Pretrain) -> Corpus:
    """What to train and to judge on. SourceError for texts that are too short."""
    ids = tokenizer.encode(words).ids
    if other is not None:
        held, needed = tokenizer.encode(other).ids, settings.held_out * settings.length
        if len(held) < needed:
            raise SourceError(
                f"the held-out text has {len(held)} tokens, and pretrain.held_out asks for {needed} "
                f"({settings.held_out} sequences of {settings.length}); give more --held-out text, or lower it."
            )
        ids = held[:needed] + ids
    return make_corpus(ids, settings, settings.length, "the text", "pretrain")


def _save(variant: Variant, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with quiet():
        variant.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):  # which its library writes for the owner alone
        path.chmod(mode)
