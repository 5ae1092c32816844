"""Tiny encoders of sound, made from configs: 3 blocks, made for short recordings; and recordings for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

from surgery.anatomy.encoders import examine_encoder
from surgery.live.model import Live
from surgery.live.port import port_of

RATE, BLOCKS, WIDTH = 16_000, 3, 32
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
# Frames of 1,000 samples: 16 a second.
_WAVES: dict[str, Any] = {
    **_SIZES, "conv_dim": [16, 16, 16], "conv_kernel": [10, 10, 10], "conv_stride": [10, 10, 10],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
}  # fmt: skip
_MEL: dict[str, Any] = {
    "d_model": WIDTH, "encoder_layers": BLOCKS, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 50,
    "max_target_positions": 16, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": [],
}  # fmt: skip
BINS = 8
SECONDS = 1  # of what the tiny Whisper reads
_AT_10_MS = 100 * SECONDS
# Model type -> its config, the shape of a second as it is given, and how many tokens that becomes.
HEARING: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "whisper": ({**_MEL, "num_mel_bins": BINS}, (BINS, _AT_10_MS), 50),
    "wav2vec2": (_WAVES, (16_000,), 16),
    "hubert": ({**_WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}, (16_000,), 16),
    "data2vec-audio": (_WAVES, (16_000,), 16),
    "unispeech": (_WAVES, (16_000,), 16),
    "unispeech-sat": (_WAVES, (16_000,), 16),
    "sew": ({**_WAVES, "squeeze_factor": 2}, (16_000,), 8),
    "wav2vec2-conformer": ({**_WAVES, "position_embeddings_type": "rotary"}, (16_000,), 16),
    "speech_to_text": (
        {**_MEL, "input_feat_per_channel": BINS, "input_channels": 1, "conv_channels": 16, "max_source_positions": 800},
        (_AT_10_MS, BINS), 25,
    ),
    "moonshine": (
        {
            "hidden_size": WIDTH, "encoder_num_hidden_layers": BLOCKS, "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 99,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        },
        (16_000,), 40,
    ),
    "audio-spectrogram-transformer": (
        {
            **_SIZES, "num_mel_bins": 16, "max_length": 32, "patch_size": 8, "frequency_stride": 4, "time_stride": 4,
        },
        (32, 16), 23,
    ),
}  # fmt: skip
# Those that are refused, and what of the reason is said.
DEAF: dict[str, tuple[dict[str, Any], str]] = {
    "wavlm": (_WAVES, "AttentionInterface, where it could be seen"),
    "sew-d": (_WAVES, "AttentionInterface, where it could be seen"),
    "wav2vec2-conformer": (
        {**_WAVES, "position_embeddings_type": "relative"}, "it passes position_bias to its attention",
    ),
    "wav2vec2-bert": (
        {**_SIZES, "feature_projection_input_dim": BINS}, "it passes position_bias to its attention",
    ),
    "encodec": ({}, "its structure could not be read without weights"),
}  # fmt: skip
_EXTRACTORS: dict[str, dict[str, Any]] = {
    "whisper": {
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": BINS, "sampling_rate": RATE,
        "hop_length": 160, "chunk_length": SECONDS, "n_fft": 400, "padding_value": 0.0, "n_samples": _AT_10_MS * 160,
    },
    "speech_to_text": {
        "feature_extractor_type": "Speech2TextFeatureExtractor", "feature_size": BINS, "num_mel_bins": BINS,
        "sampling_rate": RATE, "padding_value": 0.0,
    },
    "audio-spectrogram-transformer": {
        "feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "num_mel_bins": 16, "max_length": 32,
        "sampling_rate": RATE, "padding_value": 0.0,
    },
}  # fmt: skip
_OF_WAVES = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "sampling_rate": RATE,
    "padding_value": 0.0, "do_normalize": True,
}  # fmt: skip


def hearing_config(kind: str) -> dict[str, Any]:
    """What config.json of a tiny one says."""
    return {"model_type": kind, **copy.deepcopy(HEARING[kind][0])}


def hearing_model(kind: str, name: str | None = None) -> PreTrainedModel:
    """With random weights that make each part matter; of the class `name`, or what AutoModel loads."""
    torch.manual_seed(0)
    config = hearing_config(kind)
    parsed = CONFIG_MAPPING[config.pop("model_type")](**config)
    made = AutoModel.from_config(parsed) if name is None else getattr(transformers, name)(parsed)
    model: PreTrainedModel = made.eval()
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1 and "parametrizations" not in path:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in path and path.endswith("weight"):  # else what comes out of each block is of one length
            torch.nn.init.uniform_(parameter, 0.1, 3)
    return model


def live_hearing(kind: str) -> Live:
    """The same, ready for recordings of the size that it was made for."""
    anatomy = examine_encoder(hearing_config(kind))
    return Live(hearing_model(kind), anatomy, port_of(anatomy))


def save_hearing(root: Path, kind: str, name: str | None = None) -> Path:
    """A checkpoint with a feature extractor in `root`."""
    hearing_model(kind, name).save_pretrained(root)
    (root / "preprocessor_config.json").write_text(json.dumps(_EXTRACTORS.get(kind, _OF_WAVES)))
    return root


def sound(seed: int, seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    """A few tones that come and go over noise, and a click, (samples,)."""
    source = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * source.uniform(100, 3000) * time + source.uniform(0, 6)) for _ in range(3))
    quiet = 0.2 * tones * np.sin(2 * np.pi * source.uniform(1, 4) * time) + source.normal(0, 0.01, len(time))
    at = source.integers(0, len(time) - rate // 20)
    quiet[at : at + rate // 50] += 0.5
    return np.clip(quiet, -1, 1).astype(np.float32)


def save_recordings(root: Path, count: int, seconds: float = SECONDS, rate: int = RATE) -> Path:
    """Files of several kinds, mono and stereo."""
    import soundfile

    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        suffix = ("wav", "flac")[index % 2]
        values = sound(index, seconds, rate)
        soundfile.write(
            root / f"{index:02}.{suffix}", np.stack([values, values], 1) if index % 3 == 0 else values, rate
        )
    return root
