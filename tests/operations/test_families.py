"""The matrix: every causal language model type of transformers is exact, refused with its reason, or not a fit.

Exact is shown here on live tiny models in float64, and in `test_families_on_disk.py` after a round trip through files.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.families import EXACT, OTHERS, OUTCOMES, PREFIX, Family, behind, families, in_tiers
from helpers.tiny import build, live_of, one_thread, tiny_text
from helpers.ways import LENGTH, WAYS, cached, padded, plain
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from surgery.anatomy.sites import examine
from surgery.errors import UnsupportedModel
from surgery.live.graft import fold, grafted
from surgery.live.model import Live
from surgery.verification.equivalence import compare_random_ids, take_control

# Relative to the largest logit. Norms, softmax or query scales that round to float32 cost up to 1e-6; a slot at a wrong
# place, or seen by one query too many, is off by 1e-2 and more.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


def test_the_table_has_a_row_for_every_type_and_no_other():
    known, rows = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), set(families())
    assert known == rows, f"new in transformers: {sorted(known - rows)}; gone: {sorted(rows - known)}"


def test_rows_say_what_they_must():
    for family in families().values():
        assert family.outcome in OUTCOMES, family
        assert (family.why is None) == (family.outcome == "exact"), family
        assert (family.positions is not None) == (family.outcome == "exact"), family


@pytest.mark.parametrize("kind", in_tiers(EXACT))
def test_exact(kind):
    assert_exact(families()[kind])


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"alibi": True, "num_attention_heads": 6, "hidden_size": 48}),  # no power of two: other slopes
        ("falcon", {"new_decoder_architecture": True}),
        ("falcon", {"multi_query": False, "num_kv_heads": 4}),
        ("bloom", {"n_head": 6, "hidden_size": 48}),
        ("mpt", {"n_heads": 6, "d_model": 48}),
        ("llama", {"rope_parameters": LONGROPE}),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    ],
)
def test_variants_of_a_family_are_exact(kind, changes):
    assert_exact(families()[kind], **changes)


def test_falcon_rounds_its_alibi_to_bfloat16_and_so_do_we():
    """Beyond 256 places bfloat16 cannot tell neighbours apart: text must round where it did behind the prefix."""
    config = families()["falcon"].config(alibi=True, max_position_embeddings=512)
    assert_same(config, tiny_text(1, 400), {"plain": plain})


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rotary_that_changes_with_length_raises_where_it_would(rope):
    """Rotary positions that change with the length of the text raise where they would change."""
    limit = 64
    config = families()["llama"].config(rope_parameters=rope, max_position_embeddings=limit * (1 + (rope is LONGROPE)))
    model = build(config)
    live = live_of(model)
    longest = limit - len(PREFIX)
    with torch.no_grad(), grafted(live, fold(live, PREFIX, "as_prefix")):
        model(input_ids=tiny_text(1, longest))
        with pytest.raises(ValueError, match=f"texts of up to {longest} tokens"):
            model(input_ids=tiny_text(1, longest + 1))


def assert_exact(family: Family, **changes) -> None:
    with family.default_dtype():
        assert_same(family.config(**changes), tiny_text(2, LENGTH), WAYS)


def assert_same(config, text: torch.Tensor, ways: dict) -> None:
    """The folded model is the original behind the prefix, whichever way the text is fed."""
    with torch.inference_mode():
        model = build(config)
        live = Live(model, examine(config.to_dict()))
        control = model(input_ids=behind(text), use_cache=False).logits[:, len(PREFIX) :]
        bare = model(input_ids=text, use_cache=False).logits
        # Some originals forget their state between pieces of more than one token, and kernels of a state round to
        # float32, in chunks that padding moves: the comparison is with the original fed in the same way.
        same_way = {"cached": cached(model, behind(text), len(PREFIX))}
        if live.anatomy.mixers:
            same_way["padded"] = padded(model, behind(text), len(PREFIX))
        size = control.abs().max()
        tolerance = TOLERANCE * (10 if live.anatomy.mixers else 1)
        assert (bare - control).abs().max() > 1e-2 * size, "the prefix hardly matters: this would prove nothing"
        with grafted(live, fold(live, PREFIX, "as_prefix")):
            for how, way in ways.items():
                logits = way(model, text)
                if logits is not None:
                    expected = same_way.get(how, control)
                    assert (logits - expected[:, -logits.shape[1] :]).abs().max() < tolerance * size, how
        assert torch.equal(model(input_ids=text, use_cache=False).logits, bare), "the graft was not taken out again"


@pytest.mark.parametrize("kind", in_tiers(OTHERS))
def test_refused_with_the_reason(kind):
    family = families()[kind]
    with pytest.raises(UnsupportedModel) as caught:
        config = family.config()
        anatomy = examine(config.to_dict())
        # What structure does not show is found out on random token ids, before anything is written.
        live = Live(build(config).float(), anatomy)
        folded, control = fold(live, PREFIX, "as_prefix"), take_control(live, PREFIX)
        with grafted(live, folded):
            compare_random_ids(live, control)
    said = str(caught.value)
    assert family.why in said
    assert "\n" not in said and not re.search(r"\. [A-Z]", said), "one sentence"


def test_the_readme_says_what_the_table_says():
    script = ROOT / "bin" / "support_table.py"
    found = subprocess.run([sys.executable, str(script), "--check"], stdin=subprocess.DEVNULL)
    assert found.returncode == 0, "run bin/support_table.py"
