"""Which weights turn with the residual stream is found without names, and why a model does not follow is said."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers.families import any_model
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from torch import nn

from surgery.errors import UnsupportedModel
from surgery.live.graft import fold, grafted, on_the_seam
from surgery.live.parts import OUTSIDE, parts
from surgery.operations.orthogonal import rotation_matrix
from surgery.operations.symmetry import Way, following, heads
from surgery.operations.turning import LOUD, Gain, folding, proved, turning, turning_heads

# Of the first block: norms with the offset of their weight and what reads them; then where weights turn.
FIRST_BLOCK = {
    "llama": (
        {
            "input_layernorm": (0.0, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
            "post_attention_layernorm": (0.0, {"mlp.gate_proj", "mlp.up_proj"}),
        },
        {"self_attn.o_proj.weight": 0, "mlp.down_proj.weight": 0, "self_attn.q_proj.weight": 1},
    ),
    "gemma": (
        {
            "input_layernorm": (1.0, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
            "post_attention_layernorm": (1.0, {"mlp.gate_proj", "mlp.up_proj"}),
        },
        {"self_attn.o_proj.weight": 0},
    ),
    "gpt2": (
        {"ln_1": (0.0, {"attn.c_attn"}), "ln_2": (0.0, {"mlp.c_fc"})},
        {
            "attn.c_attn.weight": 0, "attn.c_proj.weight": 1, "attn.c_proj.bias": 0, "mlp.c_fc.weight": 0,
            "mlp.c_proj.weight": 1, "mlp.c_proj.bias": 0, "ln_1.bias": 0, "ln_2.bias": 0,
        },
    ),
    "mixtral": (
        {
            "input_layernorm": (0.0, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
            "post_attention_layernorm": (0.0, {"mlp.experts.gate_up_proj", "mlp.gate"}),
        },
        {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 1, "mlp.gate.weight": 1},
    ),
    "falcon": (
        {"ln_attn": (0.0, {"self_attention.query_key_value"}), "ln_mlp": (0.0, {"mlp.dense_h_to_4h"})},
        {"self_attention.dense.weight": 0, "mlp.dense_4h_to_h.weight": 0},
    ),
    "cohere": (
        {
            "input_layernorm": (
                0.0, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"},
            )
        },
        {"self_attn.o_proj.weight": 0, "mlp.down_proj.weight": 0},
    ),
}  # fmt: skip
FIXING = {"gpt2", "falcon", "cohere"}  # LayerNorm subtracts the mean


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


@cache
def tried(model_type: str, dtype: torch.dtype = torch.float64) -> tuple:
    return tuple(parts(live_of(any_model(model_type).to(dtype)), tiny_text(4, 32)))


def in_block(part, names) -> dict:
    return {name.removeprefix(f"{part.name}."): dim for name, dim in names}


# ---- parts


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "falcon"])
def test_parts_are_the_model_cut_at_its_stream(model_type: str) -> None:
    model, text = any_model(model_type), tiny_text(4, 32)
    with torch.no_grad():
        *blocks, outside = parts(live_of(model), text)
        stream, _, *_ = outside.run(outside.weights, outside.entering)
        for block in blocks:
            stream = stream + block.run(block.weights, stream)[0]
        logits = outside.run(outside.weights, stream)[1]
        assert torch.allclose(logits, model(input_ids=text, use_cache=False).logits, rtol=0, atol=1e-6)
    assert outside.name == OUTSIDE and outside.width == 32
    names = [
        name for part in (*blocks, outside) for name in part.weights if isinstance(part.weights[name], nn.Parameter)
    ]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))


def test_a_weight_that_two_blocks_share_is_refused() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModel, match=r"layers\.2\.mlp\.up_proj\.weight is the tensor of another place"):
        parts(live_of(model), tiny_text())


# ---- what turns


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", FIRST_BLOCK)
def test_gains_and_sides_of_a_block(model_type: str, dtype: torch.dtype) -> None:
    part, (norms, turn) = tried(model_type, dtype)[0], FIRST_BLOCK[model_type]
    way = following(part)
    assert isinstance(way, Way) and way.fixing == (model_type in FIXING)
    found = {
        gain.name.removeprefix(f"{part.name}.").removesuffix(".weight"): (
            gain.offset,
            {name.removesuffix(".weight") for name in in_block(part, gain.readers) if not name.endswith(".bias")},
        )
        for gain in way.gains
    }
    assert found == norms
    sides = in_block(part, way.sides)
    assert turn.items() <= sides.items()
    reading = {reader for _, readers in norms.values() for reader in readers}
    assert reading <= {name.removesuffix(".weight") for name in sides}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_rest_of_the_model_follows_too(model_type: str) -> None:
    outside = tried(model_type)[-1]
    way = following(outside)
    embeddings = {"llama": {"model.embed_tokens.weight"}, "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"}}
    assert isinstance(way, Way)
    assert {name for name, _ in way.sides} - {"transformer.ln_f.bias"} == embeddings[model_type] | {"lm_head.weight"}
    assert [gain.readers[-1] for gain in way.gains] == [("lm_head.weight", 1)]


def test_a_gain_that_nothing_reads_is_none() -> None:
    """Norms of queries and keys, as wide as the stream, stay: they scale what heads see of it."""
    way = following(tried("olmoe")[0])
    assert isinstance(way, Way)
    assert not any("q_norm" in gain.name or "k_norm" in gain.name for gain in way.gains)
    assert not any("q_norm" in name or "k_norm" in name for name, _ in way.sides)


# ---- what does not


@pytest.mark.parametrize(
    ("model_type", "part", "reason"),
    [
        ("gemma2", 0, "model.layers.0.post_attention_layernorm.weight scales channels of the residual stream"),
        ("olmo2", 0, "model.layers.0.post_attention_layernorm.weight scales channels"),
        ("bert", 0, "bert.encoder.layer.0.attention.output.LayerNorm.weight scales channels"),
        ("bloom", -1, "transformer.word_embeddings_layernorm.weight scales channels"),
        ("ctrl", -1, "transformer.pos_encoding, which is no weight, is added to the residual stream"),
        ("fuyu", -1, "model.vision_embed_tokens.weight is as wide as the residual stream, and text does not show"),
    ],
)
def test_why_a_part_does_not_follow(model_type: str, part: int, reason: str) -> None:
    said = following(tried(model_type)[part])
    assert isinstance(said, str) and said.startswith(reason)


def test_constant_weights_of_norms_do_not_stand_in_the_way() -> None:
    model = any_model("gemma2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(0.5)
    ways = [following(part) for part in parts(live_of(model), tiny_text(4, 32))]
    assert all(isinstance(way, Way) and way.gains == () for way in ways)


def test_a_basis_that_matters_without_a_weight() -> None:
    model = tiny_model("llama")
    block = model.model.layers[1].mlp
    block.forward = lambda states, forward=block.forward: forward(states).relu()
    *_, second, _, _, _ = parts(live_of(model), tiny_text(4, 32))
    assert following(second) == "model.layers.1 depends on the basis of the residual stream"


# ---- proof


def test_a_proof_fails_where_one_weight_is_left_out() -> None:
    part = tried("llama")[0]
    way, rotation = following(part), rotation_matrix(32, "hadamard", 0, fixing=False)
    gains = folding(way.gains, part.weights)
    assert proved(part, [*gains, *turning(way.sides, rotation)], rotation)
    for left_out in way.sides:
        others = [side for side in way.sides if side != left_out]
        assert not proved(part, [*gains, *turning(others, rotation)], rotation), left_out
    assert not proved(part, turning(way.sides, rotation), rotation), "norms have to be folded first"
    wrong = [Gain(way.gains[0].name, 1.0, way.gains[0].readers), *way.gains[1:]]
    assert not proved(part, [*folding(wrong, part.weights), *turning(way.sides, rotation)], rotation)


# ---- heads


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "falcon", "deepseek_v3", "phi3"])
def test_values_of_heads_are_found_and_turn(model_type: str) -> None:
    """Grouped, fused, interleaved and latent: where values are is read off their bits."""
    live = live_of(any_model(model_type))
    with on_the_seam(live):
        part = parts(live, tiny_text(4, 32))[0]
        (site,) = heads(live, part)
        at = live.anatomy.sites[0]
        written, *_, read = (side for side in site.sides if side.channels is not None)
        assert site.dim == at.value_dim
        groups = 2 if model_type == "falcon" else at.kv_heads  # it repeats them for attention
        assert written.written and written.channels.shape == (groups, at.value_dim)
        assert not read.written and read.channels.shape == (at.heads, at.value_dim)
        rotation = rotation_matrix(site.dim, "hadamard", 0, fixing=False)
        assert proved(part, turning_heads(site, rotation, LOUD))
        assert not proved(part, turning_heads(site, rotation)[1:])


@pytest.mark.parametrize("model_type", ["laguna", "bitnet"])
def test_what_stands_after_attention_keeps_heads_as_they_are(model_type: str) -> None:
    """A gate, and a norm, between the heads and what reads them."""
    live = live_of(any_model(model_type))
    assert [heads(live, part) for part in parts(live, tiny_text(4, 32))[:-1]] == [[]] * 4


def test_a_clamp_that_no_value_reaches_is_found_out() -> None:
    model = any_model("olmo")
    for layer in model.model.layers:
        layer.self_attn.config.clip_qkv = 50.0
    live = live_of(model)
    part = parts(live, tiny_text(4, 32))[0]
    (site,) = heads(live, part)
    rotation = rotation_matrix(site.dim, "hadamard", 0, fixing=False)
    assert proved(part, turning_heads(site, rotation))
    assert not proved(part, turning_heads(site, rotation, LOUD))


def test_slots_turn_with_the_heads() -> None:
    live = live_of(tiny_model("llama"))
    with grafted(live, fold(live, [1, 5], "as_prefix")):
        part = parts(live, tiny_text(4, 32))[0]
        (site,) = heads(live, part)
        assert site.sides[-1].name == "model.layers.0.self_attn.attention_bias.value"
        rotation = rotation_matrix(site.dim, "hadamard", 0, fixing=False)
        assert proved(part, turning_heads(site, rotation, LOUD))
        assert not proved(part, turning_heads(site, rotation)[:-1])
