"""Attention statistics, variance of outputs, selection, and the hooks of a pass, against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.families import any_model
from helpers.tiny import live_of, tiny_config, tiny_model, tiny_text
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surgery.anatomy.calls import Call, _Listening, observing
from surgery.live.graft import fold, grafted, on_the_seam
from surgery.live.places import down_projections
from surgery.live.stream import Batch, Observer, stream
from surgery.runtime.eab_runtime import Slots
from surgery.survey.attention import AttentionStatistics, Selection, ValueVariance, spaced
from surgery.survey.softmax import Softmax

PREFIX = (5, 7)
ALL = 10**6  # rows: look at every one


class Keep(Observer):
    """Every call and its output, and what goes through down projections."""

    def __init__(self):
        self.calls, self.outputs, self.down = {}, {}, {}

    def attended(self, block, call, output, batch):
        self.calls.setdefault(block, []).append(call)
        self.outputs.setdefault(block, []).append(output)

    def units(self, block, activations, written, batch):
        self.down.setdefault(block, []).append((activations, written))


def softmax_rows(call: Call, window: int | None = None) -> np.ndarray:
    """Weights (B, Hq, T, n + S [+ 1]) of a call in float64, from its tensors; `window` for sites that have one."""
    queries, keys = (part.detach().double().numpy() for part in (call.query, call.key))
    slots = getattr(call.module, "attention_bias", None)
    n = 0 if slots is None else len(slots.key)
    if n:
        front = np.moveaxis(slots.key.detach().double().numpy(), 0, 1)
        keys = np.concatenate([np.broadcast_to(front, (len(keys), *front.shape)), keys], axis=2)
    keys = np.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    if (factor := call.arguments.get("query_scale")) is not None:
        queries = queries * factor.double().numpy()
    scale = call.arguments.get("scaling")
    logits = np.einsum("bhtd,bhpd->bhtp", queries, keys) * (queries.shape[-1] ** -0.5 if scale is None else scale)
    if cap := call.arguments.get("softcap"):
        logits = cap * np.tanh(logits / cap)
    if (bias := call.arguments.get("logit_bias")) is not None:
        logits = logits + bias.double().numpy()
    rows, places = np.indices(logits.shape[2:])
    behind = rows + n - places  # how far back a place stands
    hidden = (behind < 0) | (behind >= (window or math.inf))
    logits = np.where(hidden, -np.inf, logits)
    if (learned := call.arguments.get("s_aux")) is not None:
        extra = np.broadcast_to(learned.detach().double().numpy()[None, :, None, None], (*logits.shape[:3], 1))
        logits = np.concatenate([logits, extra], axis=-1)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def entropies(weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(weights > 0, weights * np.log(weights), 0.0).sum(axis=-1)


def expected_row(weights: np.ndarray, n: int, learned: bool) -> dict:
    """The survey's keys for one layer; weights (B, Hq, T, P)."""
    entropy, places = entropies(weights), (weights > 0).sum(axis=-1)
    wide = places[0, 0] > 1
    scores = weights[..., : n + 1].mean(axis=(0, 2))
    row = {
        "sink_score": scores[:, n],
        "slot_score": scores[:, :n],
        "sink_rate": np.mean(scores.max(axis=1) >= 0.3),
        "attention_entropy": entropy.mean(axis=(0, 2)),
        "effective_tokens": np.exp(entropy.mean(axis=(0, 2))),
        "mixing": np.mean(entropy[:, :, wide] / np.log(places[:, :, wide])),
    }
    return row | ({"learned_sink_score": weights[..., -1].mean(axis=(0, 2))} if learned else {})


def assert_close(found: dict, expected: dict, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.allclose(np.array(found[name]).reshape(np.shape(value)), value, atol=atol), name


def observed(model, observers, chunks, prefix=()):
    stream(live_of(model), chunks, observers, prefix=prefix)


# ---- against numpy, on the tensors of real calls

# window of the site in block b, or None; gpt_oss has learned sinks, gemma2 soft caps, bloom ALiBi, deepseek_v3 D != E
KINDS = {
    "llama": lambda b: None,
    "mistral": lambda b: 8,
    "gpt2": lambda b: None,
    "gemma2": lambda b: (8, None)[b % 2],
    "gpt_oss": lambda b: (8, None)[b % 2],
    "bloom": lambda b: None,
    "deepseek_v3": lambda b: None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [0, 2], ids=["plain", "folded"])
def test_statistics_are_those_of_the_weights_written_out(kind: str, slots: int) -> None:
    model = any_model(kind)
    live, chunks = live_of(model), tiny_text(rows=3, length=30)
    found, kept = AttentionStatistics(), Keep()
    if slots:
        with grafted(live, fold(live, PREFIX, "as_prefix")):
            stream(live, chunks, [found, kept])
            expected = {b: softmax_rows(calls[0], KINDS[kind](b)) for b, calls in kept.calls.items()}
    else:
        stream(live, chunks, [found, kept])
        expected = {b: softmax_rows(calls[0], KINDS[kind](b)) for b, calls in kept.calls.items()}
    assert found.rows().keys() == {block + 1 for block in range(len(live.anatomy.blocks))}
    for block, weights in expected.items():
        learned = kept.calls[block][0].arguments.get("s_aux") is not None
        assert learned == (kind == "gpt_oss")
        assert_close(found.rows()[block + 1], expected_row(weights, slots, learned), atol=1e-9)


def test_queries_scaled_by_place_are_so_in_the_statistics() -> None:
    """Queries that a model scales by their place are scaled for the statistics too."""
    model = tiny_model("llama4_text")
    live, chunks = live_of(model), tiny_text(rows=2, length=12)  # within a chunk of 16
    found, kept = AttentionStatistics(), Keep()
    with grafted(live, fold(live, PREFIX, "as_prefix")):
        stream(live, chunks, [found, kept])
        assert any(calls[0].arguments.get("query_scale") is not None for calls in kept.calls.values())
        for block, calls in kept.calls.items():
            expected = expected_row(softmax_rows(calls[0]), 2, learned=False)
            assert_close(found.rows()[block + 1], expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss", "gemma2"])
def test_a_prefix_and_its_slots_give_the_same_figures(kind: str) -> None:
    """A prefix and the slots that were folded from it give the same figures."""
    model = any_model(kind)
    live, chunks = live_of(model), tiny_text(rows=2, length=20)
    samples = 6 if kind in ("llama", "mistral") else ALL  # where only slots bring the kernel, the others see every row
    before = [AttentionStatistics(samples), ValueVariance(), Selection(rows=6)]
    after = [AttentionStatistics(samples), ValueVariance(), Selection(rows=6)]
    stream(live, chunks, before, prefix=PREFIX)
    with grafted(live, fold(live, PREFIX, "as_prefix")):
        stream(live, chunks, after)
    for one, other in zip(before, after, strict=True):
        for layer, row in one.rows().items():
            row.pop("attended_by_length", None)
            assert_close({k: v for k, v in other.rows()[layer].items() if k in row}, row, atol=1e-9)


def test_in_half_precision_rows_are_looked_at_in_full() -> None:
    model = tiny_model("llama", torch.bfloat16)
    found, kept = AttentionStatistics(ALL), Keep()
    observed(model, [found, kept], tiny_text(rows=2, length=40))
    for block, calls in kept.calls.items():
        assert calls[0].query.dtype == torch.bfloat16
        assert_close(found.rows()[block + 1], expected_row(softmax_rows(calls[0]), 0, learned=False), atol=1e-4)


# ---- both ways of looking at rows, and any mask


def a_call(heads=4, kv_heads=2, queries=9, keys=9, dim=8, mask=None, seed=0, **arguments) -> Call:
    source = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(2, h, length, dim, generator=source, dtype=torch.float64)
        for h, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    return Call(nn.Module(), 3 * query, key, value, mask, arguments)


@given(
    st.integers(1, 40), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.integers(0, 3), st.booleans(), st.integers(0, 9)
)
def test_the_kernel_and_written_weights_agree_within_bounds(length, heads, lead, learned, seed) -> None:
    lead = min(lead, length - 1)
    extra = {"s_aux": torch.linspace(-2, 2, heads[0], dtype=torch.float64)} if learned else {}
    softmax = Softmax(a_call(*heads, length, length, seed=seed, **extra))
    queries = torch.tensor(softmax.text(lead))
    fast, slow = softmax.rows(queries, lead), softmax._from_weights(queries, lead)
    assert softmax._is_plain() and len(queries) == length - lead
    for name in ("first", "slots", "learned"):
        one, other = getattr(fast.sinks, name), getattr(slow.sinks, name)
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-12)
    assert torch.allclose(fast.entropy, slow.entropy, atol=1e-11)
    assert torch.equal(fast.places.expand_as(fast.entropy), slow.places.expand_as(slow.entropy))
    assert (fast.entropy >= 0).all() and (fast.entropy <= fast.places.double().log() + 1e-9).all()
    taken = fast.sinks.first + fast.sinks.slots.sum(dim=-1) + (fast.sinks.learned if learned else 0)
    assert (taken <= 1 + 1e-12).all()


def test_an_additive_mask_is_a_bool_one_or_a_bias() -> None:
    seen = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)[None, None]
    low = torch.finfo(torch.float64).min
    added = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(~seen, low)
    queries = torch.arange(9)
    as_bool, as_added = (Softmax(a_call(mask=mask)) for mask in (seen, added))
    assert as_bool._is_plain() and not as_added._is_plain()
    one, other = as_bool.rows(queries), as_added.rows(queries)
    assert torch.allclose(one.entropy, other.entropy) and torch.allclose(one.sinks.first, other.sinks.first)
    assert torch.equal(one.places, other.places) and one.places.amax() == 4
    tilted = Softmax(a_call(mask=added + torch.linspace(0, 2, 9, dtype=torch.float64).clamp(max=2)))
    assert not torch.allclose(tilted.rows(queries).entropy, other.entropy)


def test_queries_at_the_end_of_the_keys_see_all_before_them() -> None:
    """Some models compute their last blocks for the last tokens only, with all keys."""
    whole, end = a_call(), a_call()
    end = Call(end.module, end.query[:, :, 6:], end.key, end.value, None)
    expected, found = Softmax(whole).rows(torch.arange(9)), Softmax(end).rows(torch.arange(3))
    assert torch.allclose(found.entropy, expected.entropy[:, :, 6:]) and found.places.tolist() == [[[7, 8, 9]]]
    expected, found = Softmax(whole).weights(torch.arange(6, 9))[0], Softmax(end).weights(torch.arange(3))[0]
    assert torch.allclose(found, expected)


def test_a_head_that_attends_to_a_slot_counts_as_a_sink() -> None:
    """A head that gives its attention to a slot counts as one that sinks."""
    site = nn.Module()
    site.attention_bias = Slots(1, 2, 8, 8)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None].expand(2, 8)  # heads 0 and 1 like the slot
    site.attention_bias.key = site.attention_bias.value = nn.Parameter(sign[None])
    flat = a_call(queries=40, keys=40)
    call = Call(site, torch.ones_like(flat.query), torch.zeros_like(flat.key), flat.value, None)
    found = AttentionStatistics()
    found.attended(0, call, flat.query, Batch(torch.zeros(2, 40), 0))
    place = np.arange(1, 41)
    liked = np.mean(np.exp(8**0.5) / (np.exp(8**0.5) + place))
    row = found.rows()[1]
    assert np.allclose(np.ravel(row["slot_score"])[:2], liked) and liked > 0.3 > max(row["sink_score"])
    assert row["sink_rate"] == 0.5


def test_one_token_has_nothing_to_spread_over() -> None:
    model, observers = tiny_model("llama"), [AttentionStatistics(), ValueVariance(), Selection()]
    observed(model, observers, tiny_text(rows=2, length=1))
    statistics, variance, selection = (observer.rows()[1] for observer in observers)
    assert statistics["mixing"] is None and np.allclose(statistics["attention_entropy"], 0, atol=1e-12)
    assert np.allclose(statistics["sink_score"], 1, atol=1e-12) and statistics["sink_rate"] == 1.0
    assert variance["value_variance_rest"] is None and selection["separability"] == [None] * 4
    assert selection["attended_share"] == [1.0] * 4 and selection["attended_by_length"]["tokens"] == [1.0]


# ---- sampled rows


@given(st.integers(1, 300), st.integers(0, 5), st.integers(1, 64), st.integers(0, 20))
def test_sampled_rows_are_spread_over_the_text(length: int, lead: int, count: int, turn: int) -> None:
    rows = spaced(range(lead, lead + length), count, turn).tolist()
    assert len(rows) == min(count, length) and rows == sorted(set(rows))
    assert lead <= rows[0] and rows[-1] < lead + length
    assert np.diff(rows, prepend=lead - 1, append=lead + length).max() <= 2 * math.ceil(length / count)


def test_over_many_batches_every_row_is_looked_at_equally_often() -> None:
    counts = np.bincount(np.concatenate([spaced(range(100), 10, turn).numpy() for turn in range(500)]), minlength=100)
    assert counts.min() >= 48 and counts.max() <= 52


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("slots", [0, 2], ids=["plain", "folded"])
def test_with_sampled_rows_scores_are_still_of_every_row(kind, slots) -> None:
    """Scores are of every row, entropy only of the sampled ones."""
    model = tiny_model(kind)
    live, chunks = live_of(model), tiny_text(rows=2, length=30)
    found, kept = AttentionStatistics(rows=7), Keep()
    with grafted(live, fold(live, PREFIX, "as_prefix")) if slots else on_the_seam(live):
        stream(live, chunks, [found, kept])
        weights = [softmax_rows(kept.calls[b][0], KINDS[kind](b)) for b in range(4)]
    sampled = spaced(range(30), 7).numpy()
    for block in range(4):
        assert kept.calls[block][0].lse is not None
        row, every = found.rows()[block + 1], expected_row(weights[block], slots, False)
        some = expected_row(weights[block][:, :, sampled], slots, False)
        for name in ("sink_score", "slot_score", "sink_rate"):
            assert np.allclose(row[name], every[name], atol=1e-9)
        for name in ("attention_entropy", "mixing", "effective_tokens"):
            assert np.allclose(row[name], some[name], atol=1e-9)
            assert not np.allclose(row[name], every[name], atol=1e-9)


# ---- variance of outputs


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["bare", "prefix"])
def test_variance_is_of_the_first_token_and_of_the_rest(prefix) -> None:
    """Variance is taken over the channels of the first token, and of the rest."""
    model, found, kept = tiny_model("qwen2"), ValueVariance(), Keep()
    observed(model, [found, kept], tiny_text(rows=3, length=12), prefix)
    for block, outputs in kept.outputs.items():
        call = kept.calls[block][0]
        values = np.repeat(call.value.double().numpy(), 2, axis=1)
        heads = np.einsum("bhtp,bhpe->bhte", softmax_rows(call), values)
        assert np.allclose(np.moveaxis(heads, 1, 2), outputs[0], atol=1e-9)  # what heads attend to, and its layout
        variance = heads[:, :, len(prefix) :].var(axis=-1)
        row = found.rows()[block + 1]
        assert np.allclose(row["value_variance_first"], variance[:, :, 0].mean(axis=0))
        assert np.allclose(row["value_variance_rest"], variance[:, :, 1:].mean(axis=(0, 2)))


# ---- selection


def expected_selection(weights: np.ndarray, values: np.ndarray) -> tuple[int, int, float | None, float, float]:
    """Of one row: N, L, separability, distance, largest p (1 - p). weights (P,), values (P, E)."""
    seen = weights > 0
    order, total, chosen = np.argsort(-weights), 0.0, []
    for place in order:
        if total >= 0.9:
            break
        chosen.append(place)
        total += weights[place]
    others = [place for place in np.flatnonzero(seen) if place not in chosen]
    far = np.linalg.norm(values - weights @ values, axis=-1)
    separable = None if not others else np.mean([far[i] < min(far[j] for j in others) for i in chosen])
    ours, theirs = (weights[list(part)] @ values[list(part)] if part else 0 for part in (chosen, others))
    norm = np.sum(weights * np.linalg.norm(values, axis=-1))
    return (
        len(chosen),
        int(seen.sum()),
        separable,
        np.linalg.norm(ours - theirs) / norm,
        np.max(weights * (1 - weights)),
    )


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_selection_is_what_its_definition_says(kind: str) -> None:
    model = any_model(kind)
    live, chunks = live_of(model), tiny_text(rows=2, length=30)
    found, kept = Selection(rows=5), Keep()
    with grafted(live, fold(live, PREFIX, "as_prefix")):
        stream(live, chunks, [found, kept])
        for block, (call,) in kept.calls.items():
            weights = softmax_rows(call, KINDS[kind](block))
            slots = np.moveaxis(call.module.attention_bias.value.detach().numpy(), 0, 1)
            values = np.concatenate([np.broadcast_to(slots, (2, *slots.shape)), call.value.numpy()], axis=2)
            values = np.repeat(np.pad(values, ((0, 0), (0, 0), (0, int(kind == "gpt_oss")), (0, 0))), 2, axis=1)
            rows = [
                [
                    [expected_selection(weights[b, h, t], values[b, h]) for t in spaced(range(30), 5).tolist()]
                    for b in range(2)
                ]
                for h in range(4)
            ]
            row = found.rows()[block + 1]
            for head in range(4):
                several = [one for sequence in rows[head] for one in sequence]
                assert np.isclose(row["attended_share"][head], np.mean([n / length for n, length, *_ in several]))
                apart = [np.mean([one[2] for one in sequence if one[2] is not None]) for sequence in rows[head]]
                assert np.isclose(row["separability"][head], np.mean(apart))
                assert np.isclose(row["selection_distance"][head], np.mean([one[3] for one in several]))
                steep = np.mean([one[4] for one in several]) * call.scale
                assert np.isclose(row["gradient_sensitivity"][head], steep)
                assert row["gradient_sensitivity"][head] <= row["gradient_bound"] == call.scale / 4
                assert 0 <= row["selection_distance"][head] <= 1
            by_length = {}
            for one in (one for head in rows for sequence in head for one in sequence):
                by_length.setdefault(one[1], []).append(one[0])
            assert row["attended_by_length"]["length"] == sorted(by_length)
            assert np.allclose(row["attended_by_length"]["tokens"], [np.mean(by_length[n]) for n in sorted(by_length)])


def test_selection_starts_elsewhere_in_each_batch(monkeypatch) -> None:
    monkeypatch.setattr("surgery.live.port.LOGIT_BYTES", 0)  # batches of one
    model, found = tiny_model("llama"), Selection(rows=2)
    observed(model, [found], tiny_text(rows=3, length=20))
    expected = sorted(int(row) + 1 for turn in range(3) for row in spaced(range(20), 2, turn))
    assert found.rows()[1]["attended_by_length"]["length"] == expected and len(set(expected)) == 6


# ---- the hooks of a pass


def test_units_are_the_input_and_output_of_the_down_projection() -> None:
    for kind, name in (("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("opt", "fc2"), ("gemma2", "mlp.down_proj")):
        model, kept, seen = tiny_model(kind), Keep(), {}

        def keep(module, args, output, seen=seen):
            seen[module] = (args[0], output)

        live = live_of(model)
        trunk = live.trunk
        down = [trunk.get_submodule(f"{block}.{name}") for block in live.anatomy.blocks]
        hooks = [module.register_forward_hook(keep) for module in down]
        stream(live, tiny_text(rows=2, length=7), [kept])
        for hook in hooks:
            hook.remove()
        assert down_projections(live) == dict(enumerate(down)) and kept.down.keys() == {0, 1, 2, 3}
        for index, ((activations, written),) in kept.down.items():
            wide = model.config.get_text_config().to_dict().get("ffn_dim") or 48
            assert activations.shape == (2, 7, wide if kind != "gpt2" else 128) and written.shape == (2, 7, 32)
            assert torch.equal(activations.flatten(), seen[down[index]][0].flatten())
            assert torch.equal(written.flatten(), seen[down[index]][1].flatten())


def test_the_output_projection_of_a_site_is_no_down_projection() -> None:
    model = tiny_model("llama", config=tiny_config("llama", head_dim=16))  # 4 heads of 16 into a stream of 32
    live = live_of(model)
    assert model.model.layers[0].self_attn.o_proj.in_features == 64
    assert down_projections(live) == {i: model.model.layers[i].mlp.down_proj for i in range(4)}


def test_a_block_without_one_down_projection_has_no_units() -> None:
    """Fused experts (mixtral) have none, longcat_flash has two MLPs; qwen2_moe's blocks without experts have one."""
    for kind, blocks in (("mixtral", set()), ("longcat_flash", set()), ("qwen2_moe", {1})):
        model, kept = any_model(kind), Keep()
        observed(model, [kept], tiny_text(rows=2, length=7))
        assert kept.down.keys() == blocks


def test_a_projection_of_some_tokens_only_has_no_units() -> None:
    """A down projection that sees only some of the tokens (an expert's) has no units."""
    model, kept = tiny_model("llama"), Keep()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda states: states + mlp.down_proj(states.new_ones(2, 3, 48)).mean()
    observed(model, [kept], tiny_text(rows=2, length=7))
    assert kept.down.keys() == {0, 2, 3}


def test_a_pass_without_logits_computes_every_token_everywhere() -> None:
    """A pass without logits still computes every token in every block."""

    class Lengths(Observer):
        def __init__(self):
            self.seen = set()

        def hidden(self, layer, states, batch):
            self.seen.add(states.shape[1])

        def attended(self, block, call, output, batch):
            self.seen.add(output.shape[1])

    for kind in ("gemma4_text", "llama", "gpt2", "opt"):
        model, lengths, logits = any_model(kind), Lengths(), []
        model.register_forward_hook(lambda module, args, output, logits=logits: logits.append(output.logits.shape[1]))
        observed(model, [lengths], tiny_text(rows=2, length=9))
        assert lengths.seen == {9} and logits == [1]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss", "gemma2"])
def test_looking_at_outputs_changes_no_bit_of_them(kind: str) -> None:
    model, ids, heard = tiny_model(kind, torch.float32), tiny_text(), []
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            plain = model(input_ids=ids).logits
            with observing(None, lambda call, output: heard.append(call)):
                assert torch.equal(model(input_ids=ids).logits, plain)
    assert len(heard) == 8
    for index, call in enumerate(heard):
        assert (call.lse is not None) == (kind in ("llama", "mistral")), "eager attention knows no log-sum-exp"
        if call.lse is not None:
            weights = softmax_rows(call, KINDS[kind](index % 4))
            products = np.einsum("bhtd,bhd->bht", call.query.numpy(), np.repeat(call.key[:, :, 0].numpy(), 2, axis=1))
            near = weights[..., 0] > 0
            assert np.allclose(np.exp(products * call.scale - call.lse.numpy())[near], weights[..., 0][near], atol=1e-5)


def test_a_log_sum_exp_over_other_keys_is_not_taken() -> None:
    """A log-sum-exp over other keys than the call's is not taken for its own."""
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 5, 8)
    with torch.inference_mode(), _Listening() as heard:
        F.scaled_dot_product_attention(query, key, key)
        assert heard.lse_over(5).shape == (1, 2, 4) and heard.lse_over(4) is None
        F.scaled_dot_product_attention(query, key, key)
    assert heard.lse_over(5) is None, "of two kernels, neither is the whole attention"


def test_observers_ask_for_no_more_than_they_use() -> None:
    assert AttentionStatistics.wants("attended") and not AttentionStatistics.wants("attention")
    assert not any(observer.wants("hidden") for observer in (AttentionStatistics, ValueVariance, Selection))
    assert Batch(torch.zeros(1, 1), 0).lead == 0 and not Observer.wants("units")
