"""Attention with slots against a plain reference that is written out row by row in float64."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from helpers.tiny import one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.runtime import eab_kernel
from surgery.runtime.eab_kernel import slot_attention

# What PyTorch says of FlexAttention on a CPU, where it is tested and not fast.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def reference(q, k, v, slot_k, slot_v, *, scale, causal=False, mask=None, slot_mask=None, softcap=None, sinks=None):
    """One query at a time, nothing clever. Returns output, weights over real keys, and which rows see anything."""
    q, k, v, slot_k, slot_v = (tensor.double() for tensor in (q, k, v, slot_k, slot_v))
    (batch, heads, queries, _), (kv_heads, keys), n = q.shape, k.shape[1:3], slot_k.shape[0]
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    weights = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    sees = torch.zeros(batch, heads, queries, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for t in range(queries):
                logits, values = [], []
                for j in range(n):
                    extra = 0.0
                    if slot_mask is not None:
                        rows = slot_mask.shape
                        cell = slot_mask[b % rows[0], h % rows[1], t % rows[2], j]
                        extra = 0.0 if slot_mask.dtype == torch.bool else float(cell)
                        if (slot_mask.dtype == torch.bool and not cell) or extra < -1e4:
                            continue
                    logits.append((float(q[b, h, t] @ slot_k[j, g]) * scale, extra, None))
                    values.append(slot_v[j, g])
                for s in range(keys):
                    extra = 0.0
                    if causal and s > t:
                        continue
                    if mask is not None:
                        cell = mask[b % mask.shape[0], h % mask.shape[1], t, s]
                        extra = 0.0 if mask.dtype == torch.bool else float(cell)
                        if (mask.dtype == torch.bool and not cell) or extra < -1e4:
                            continue
                    logits.append((float(q[b, h, t] @ k[b, g, s]) * scale, extra, s))
                    values.append(v[b, g, s])
                if not logits:
                    continue
                sees[b, h, t] = True
                capped = [(softcap * math.tanh(x / softcap) if softcap else x) + add for x, add, _ in logits]
                total = sum(math.exp(x) for x in capped) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                for x, value, (_, _, s) in zip(capped, values, logits, strict=True):
                    out[b, h, t] += math.exp(x) / total * value
                    if s is not None:
                        weights[b, h, t, s] = math.exp(x) / total
    return out, weights, sees


def random_inputs(seed, dtype=torch.float64, batch=2, kv_heads=2, groups=2, queries=5, keys=5, dim=8, v_dim=8, n=2):
    """q, k, v, k', v' with values that `dtype` can hold exactly; slots are float32, or float64 with float64 inputs."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)

    slot_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        draw(batch, kv_heads * groups, queries, dim),
        draw(batch, kv_heads, keys, dim),
        draw(batch, kv_heads, keys, v_dim),
        draw(n, kv_heads, dim).to(slot_dtype),
        draw(n, kv_heads, v_dim).to(slot_dtype),
    ]


def make_mask(kind, seed, batch, heads, queries, keys, dtype):
    """A mask over the real keys; queries are the last of the keys. 'hidden' has rows that see no key at all."""
    source = torch.Generator().manual_seed(seed)
    place, at = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    causal = (at <= place)[None, None]
    if kind == "padded":
        padding = torch.randint(0, keys, (batch, 1, 1, 1), generator=source)
        return causal & (at[None, None] >= padding)
    if kind == "windowed":
        return causal & (at > place - 2)[None, None]
    if kind == "hidden":
        mask = torch.rand(batch, heads, queries, keys, generator=source) < 0.5
        mask[0, :, 0] = False
        return mask
    if kind in ("additive", "additive_inf"):
        bias = torch.randn(1, heads, queries, keys, generator=source).to(dtype)
        # A slice, as the runtime hands it over: not contiguous.
        wide = torch.cat([bias[..., :1], bias.masked_fill(~causal, torch.finfo(dtype).min)], dim=-1)
        mask = wide[..., 1:]
        if kind == "additive_inf":
            mask = mask.masked_fill(~causal, -math.inf)
            mask[:, :, 0] = -math.inf  # a row that sees slots only
        return mask
    return None


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(["none", "causal", "padded", "windowed", "hidden", "additive", "additive_inf"]))
    queries = draw(st.integers(1, 6))
    keys = queries if kind == "causal" else queries + draw(st.integers(0, 5))
    dim = draw(st.sampled_from([4, 8, 16]))
    return {
        "kind": kind,
        "seed": draw(st.integers(0, 10_000)),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "shape": {
            "batch": draw(st.integers(1, 3)), "kv_heads": draw(st.integers(1, 3)), "groups": draw(st.integers(1, 4)),
            "queries": queries, "keys": keys, "dim": dim, "v_dim": draw(st.sampled_from([dim, dim, 12])),
            "n": draw(st.integers(1, 4)),
        },
        "slot_mask": draw(st.sampled_from([None, "some", "per_head", "bias"])),
        "softcap": draw(st.sampled_from([None, None, 1.5])),
        "sinks": draw(st.booleans()),
        "need_weights": draw(st.booleans()),
        "flex": draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=200)
@given(cases())
def test_agrees_with_the_reference(case):
    dtype, shape = case["dtype"], case["shape"]
    inputs = random_inputs(case["seed"], dtype, **shape)
    batch, heads, queries, keys = shape["batch"], inputs[0].shape[1], shape["queries"], shape["keys"]
    mask = make_mask(case["kind"], case["seed"], batch, heads, queries, keys, dtype)
    slot_mask = None
    if case["slot_mask"] == "bias":  # one for all queries, as ALiBi has it; some slots hidden
        source = torch.Generator().manual_seed(case["seed"] + 1)
        slot_mask = torch.randn((1, heads, 1, shape["n"]), generator=source).to(dtype)
        slot_mask[:, 0, :, 0] = -math.inf
    elif case["slot_mask"] is not None:
        rows = (batch, heads if case["slot_mask"] == "per_head" else 1, queries, shape["n"])
        slot_mask = torch.rand(rows, generator=torch.Generator().manual_seed(case["seed"] + 1)) < 0.6
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(2)).to(dtype) if case["sinks"] else None
    arguments = {"scale": 0.4, "causal": case["kind"] == "causal", "mask": mask, "slot_mask": slot_mask}
    arguments["softcap"] = case["softcap"]
    expected, expected_weights, sees = reference(*inputs, **arguments, sinks=sinks)
    out, weights = slot_attention(
        *inputs, **arguments, sink_logits=sinks, need_weights=case["need_weights"], flex=case["flex"]
    )
    assert out.dtype == dtype and torch.isfinite(out).all()
    error = (out.double() - expected)[sees]
    assert error.numel() == 0 or error.abs().max() < TOLERANCE[dtype]
    if case["need_weights"]:
        assert weights.shape == expected_weights.shape
        error = (weights.double() - expected_weights)[sees]
        assert error.numel() == 0 or error.abs().max() < TOLERANCE[dtype]
    else:
        assert weights is None


def without_merge():
    return mock.patch.object(eab_kernel, "_has_kernel", return_value=False)


def only_merge():
    """Both ways around the merged path fail."""
    return mock.patch.multiple(eab_kernel, _eager=mock.Mock(side_effect=AssertionError), _concatenate=None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "padded", "windowed", "additive", "additive_inf"])
def test_both_paths_agree_on_the_same_input(kind, dtype):
    inputs = random_inputs(3, dtype, queries=7, keys=7, n=3)
    slot_mask = torch.rand(2, 1, 7, 3, generator=torch.Generator().manual_seed(4)) < 0.7
    slot_mask[:, :, :, 0] = True  # every row sees something
    arguments = {
        "scale": 0.3, "causal": kind == "causal", "mask": make_mask(kind, 5, 2, 4, 7, 7, dtype), "slot_mask": slot_mask,
    }  # fmt: skip
    with only_merge():
        merged, _ = slot_attention(*inputs, **arguments)
        flexible, _ = slot_attention(*inputs, **arguments, flex=True)
    with without_merge():
        concatenated, _ = slot_attention(*inputs, **arguments)
    assert (merged - concatenated).abs().max() < TOLERANCE[dtype]
    assert (flexible - concatenated).abs().max() < TOLERANCE[dtype]


def test_sink_logits_take_part_in_the_merge():
    inputs, sinks = random_inputs(6), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    with only_merge():
        merged, _ = slot_attention(*inputs, scale=0.3, causal=True, sink_logits=sinks)
    expected, _, _ = reference(*inputs, scale=0.3, causal=True, sinks=sinks)
    assert (merged - expected).abs().max() < 1e-12


def test_a_mask_of_another_precision_than_the_query_is_taken():
    inputs = random_inputs(7, torch.bfloat16)
    mask = make_mask("additive", 8, 2, 4, 5, 5, torch.float32)
    expected, _, _ = reference(*inputs, scale=0.3, mask=mask)
    for path in (only_merge(), without_merge()):
        with path:
            out, _ = slot_attention(*inputs, scale=0.3, mask=mask)
        assert (out.double() - expected).abs().max() < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("extra", ["", "softcap", "sinks"])
def test_gradients_reach_queries_keys_values_slots_and_sinks(extra):
    leaves = random_inputs(9, batch=1, kv_heads=1, queries=3, keys=4, dim=4, v_dim=4)
    leaves += [torch.tensor([0.5, -1.0], dtype=torch.float64)] if extra == "sinks" else []
    mask = make_mask("padded", 10, 1, 2, 3, 4, torch.float64)
    slot_mask = torch.tensor([[True, True], [False, True], [True, False]])[None, None]

    def attend(q, k, v, slot_k, slot_v, sinks=None):
        return slot_attention(
            q, k, v, slot_k, slot_v, scale=0.5, mask=mask, slot_mask=slot_mask, sink_logits=sinks,
            softcap=2.0 if extra == "softcap" else None,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(attend, [tensor.requires_grad_() for tensor in leaves])


@pytest.mark.parametrize("wanted", range(5), ids=["query", "key", "value", "slot_key", "slot_value"])
def test_requires_grad_chooses_the_path_and_the_gradients(wanted):
    """The path is chosen by requires_grad, and each input that asks for a gradient gets it."""
    inputs = random_inputs(12, dtype=torch.float32)
    inputs[wanted].requires_grad_()
    out, _ = slot_attention(*inputs, scale=0.5, causal=True)
    with torch.no_grad(), only_merge():  # the same tensors, no gradient asked for: the cheap path
        cheap, _ = slot_attention(*inputs, scale=0.5, causal=True)
    assert (out - cheap).abs().max() < 2e-5
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[wanted])
    with without_merge():
        forced, _ = slot_attention(*inputs, scale=0.5, causal=True)
    (expected,) = torch.autograd.grad(forced.square().sum(), inputs[wanted])
    assert gradient.abs().max() > 0 and (gradient - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}], ids=["sdpa", "eager"])
def test_rows_that_see_nothing_keep_gradients_finite(dtype, extra):
    """Left padding in a windowed layer makes such rows; one NaN there would spoil a whole training step."""
    leaves = [tensor.requires_grad_() for tensor in random_inputs(13, dtype)]
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[0, :, :2] = False
    slot_mask = torch.ones(2, 1, 5, 2, dtype=torch.bool)
    slot_mask[0, :, :2] = False
    out, _ = slot_attention(*leaves, scale=0.5, mask=mask, slot_mask=slot_mask, **extra)
    out[:, :, 2:].float().square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in leaves)


def test_weights_leave_room_for_the_slots():
    inputs = random_inputs(14)
    _, weights = slot_attention(*inputs, scale=0.5, causal=True, need_weights=True)
    assert weights.shape == (2, 4, 5, 5)
    assert (weights.sum(-1) < 1).all() and (weights >= 0).all()


def test_dropout_drops_weights_and_nothing_else():
    """Values of one everywhere: each output is the sum of the kept weights / (1 - p); on average it stays one."""
    q, k, v, slot_k, slot_v = random_inputs(15, torch.float32, queries=64, keys=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out, _ = slot_attention(
            q, k, torch.ones_like(v), slot_k, torch.ones_like(slot_v), scale=0.1, causal=True, dropout=0.3
        )
    assert out.std() > 0.05 and abs(out.mean() - 1) < 0.05


def test_causal_is_refused_where_it_would_be_misaligned():
    inputs = random_inputs(16, queries=3, keys=5)
    with pytest.raises(ValueError, match="as many keys as queries"):
        slot_attention(*inputs, scale=1.0, causal=True)
    with pytest.raises(ValueError, match="no mask"):
        slot_attention(*random_inputs(16), scale=1.0, causal=True, mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"slot_mask": torch.tensor([[[[True, False]], [[True, True]], [[False, True]], [[True, True]]]])},
        {"causal": True, "softcap": 5.0},
        {"causal": True, "sinks": True},
        {"causal": True, "need_weights": True},
    ],
    ids=["causal", "slot mask", "softcap", "sink logits", "weights"],
)
def test_gradients_are_those_of_finite_differences(options: dict) -> None:
    """Of every path that carries gradients, towards queries, keys, values and slots, in float64."""
    inputs = [tensor.requires_grad_() for tensor in random_inputs(3, queries=3, keys=3, dim=3, v_dim=3)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if "sinks" in options else None
    rest = {key: value for key, value in options.items() if key != "sinks"}

    def attend(*tensors):
        *tensors, sink_logits = tensors if sinks is not None else (*tensors, None)
        return slot_attention(*tensors, scale=0.6, sink_logits=sink_logits, **rest)[0]

    assert torch.autograd.gradcheck(attend, (*inputs, *([sinks] if sinks is not None else [])))


def test_autocast_does_to_slots_what_it_does_to_attention() -> None:
    """Under autocast queries and keys may be wider than values (rotary does that), and a kernel wants one dtype."""
    q, k, v, slot_k, slot_v = random_inputs(4, torch.float32)
    expected, _, _ = reference(q, k, v.bfloat16().float(), slot_k, slot_v, scale=0.3, causal=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        merged, _ = slot_attention(q, k, v.bfloat16(), slot_k, slot_v, scale=0.3, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        joined, _ = slot_attention(q.requires_grad_(), k, v.bfloat16(), slot_k, slot_v, scale=0.3, causal=True)
    for out in (merged, joined):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, rtol=0.03, atol=0.03)
