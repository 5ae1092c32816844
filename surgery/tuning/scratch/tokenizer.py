"""A byte-level BPE trained on the text that the models are trained on."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SINK, SINK_ID = "<|sink|>", 0  # in every variant's vocabulary, so that all have the same tensors; in no text


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """At most `vocabulary` tokens: the sink token, the 256 bytes, and merges. What looks like a sink token is text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[SINK], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def as_pretrained(tokenizer: Tokenizer, leading: bool) -> PreTrainedTokenizerFast:
    """The same for transformers; if `leading`, the sink token begins every text, as BOS."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    if leading:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{SINK} $A", special_tokens=[(SINK, SINK_ID)])
    begins = {"bos_token": SINK} if leading else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, split_special_tokens=True, **begins)
