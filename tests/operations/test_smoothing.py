"""Channels are scaled only where the model stays the same to the bit, by the scales defined; and quantisation gains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.families import any_model
from helpers.tiny import live_of, one_thread, tiny_model, tiny_text
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from surgery.checkpoint.layout import INDEX, Layout, read_layout, read_tensor_bytes
from surgery.checkpoint.stage import Stage
from surgery.errors import UnsupportedModel
from surgery.live.graft import fold, grafted
from surgery.live.likelihood import Likelihood
from surgery.live.loading import load_original
from surgery.live.model import Live
from surgery.live.stream import stream
from surgery.operations import smoothing
from surgery.operations.base import Target
from surgery.operations.pairs import (
    Pair,
    Side,
    _watched,
    apply,
    find,
    proved,
    scaled,
    sides,
    touches,
    without_loss,
)
from surgery.operations.smoothing import Smoothing, rule, scales, smooth
from surgery.progress import Reporter
from surgery.verification.gates.base import Subject
from surgery.verification.gates.quantised import Quantised

# Pairs in the first block: (source, first row) of down projections; norms with how many layers read them.
FIRST_BLOCK = {
    "llama": ({("mlp.up_proj", 0)}, {"input_layernorm": 3, "post_attention_layernorm": 2}),
    "qwen2": ({("mlp.up_proj", 0)}, {"input_layernorm": 3, "post_attention_layernorm": 2}),
    "phi3": ({("mlp.gate_up_proj", 48)}, {"input_layernorm": 1, "post_attention_layernorm": 1}),  # gate and up in one
    "glm": ({("mlp.gate_up_proj", 48)}, {"input_layernorm": 3, "post_attention_layernorm": 1}),
    "gpt2": (set(), {"ln_1": 1, "ln_2": 1}),  # GELU: only the norms; Conv1D, and LayerNorm with its bias
    "opt": ({("fc1", 0)}, {"self_attn_layer_norm": 3, "final_layer_norm": 1}),  # ReLU
    "mixtral": (set(), {"input_layernorm": 3}),  # the other norm feeds a router and experts
    "gemma2": ({("mlp.up_proj", 0)}, {}),  # its norms scale by 1 + w
    "olmo2": ({("mlp.up_proj", 0)}, {}),  # its norms come after the layers
    "cohere": ({("mlp.up_proj", 0)}, {"input_layernorm": 5}),  # attention and MLP read the same norm
    "falcon": (set(), {"ln_attn": 1, "ln_mlp": 1}),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def smoothed(live: Live, chunks: torch.Tensor, kinds: Sequence[str] = ("down", "norm")) -> dict[str, torch.Tensor]:
    """Smooth in place, as a run does; the changed parameters by name, each made of what it was before."""
    operation, before = Smoothing(inputs=tuple(kinds)), parameters(live.model)
    parts = smooth(live, chunks, operation.inputs, operation.strength)
    operation.graft(live, parts)
    alters = operation.alters(parts, Target(live.anatomy, Layout(Path(), (), {}, {})))
    return {name: alter(before[name]) for name, alter in alters.items()}


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text, use_cache=False).logits


# ---- what is found, and that it is exact


@pytest.mark.parametrize("model_type", FIRST_BLOCK)
def test_every_pair_is_found_and_no_other(model_type: str) -> None:
    model = any_model(model_type)
    live, before, downs, norms = live_of(model), parameters(model), FIRST_BLOCK[model_type][0], {}
    with one_thread():
        pairs = find(live)
    block = f"{live.anatomy.blocks[0]}."
    first = [pair for pair in pairs if pair.source.startswith(block)]
    assert {(p.source.removeprefix(block), p.start) for p in first if p.kind == "down"} == downs
    norms = {p.source.removeprefix(block): len(p.readers) for p in first if p.kind == "norm"}
    assert norms == FIRST_BLOCK[model_type][1]
    kinds = Counter(pair.kind for pair in pairs)
    assert kinds == Counter(down=len(downs) * len(live.anatomy.blocks), norm=len(norms) * len(live.anatomy.blocks))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", FIRST_BLOCK)
def test_the_model_is_the_same_to_the_bit(model_type: str, dtype: torch.dtype) -> None:
    model, text = any_model(model_type).to(dtype), tiny_text(seed=7)
    before = parameters(model)
    with one_thread():
        expected = logits(model, text)
        changed = smoothed(live_of(model), tiny_text())
        assert torch.equal(logits(model, text), expected)
    after = parameters(model)
    assert changed.keys() == {name for name in after if not torch.equal(after[name], before[name])} != set()
    for name, tensor in changed.items():
        assert tensor.dtype == dtype and torch.equal(tensor, after[name])
        there = before[name] != 0
        mantissas, _ = torch.frexp((after[name][there] / before[name][there]).float())
        assert (mantissas == 0.5).all(), "only powers of two"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_slots_stay_and_the_model_with_them_is_the_same(model_type: str) -> None:
    model, text = any_model(model_type), tiny_text(seed=7)
    live = live_of(model)
    with one_thread():
        bare, folded = logits(model, text), fold(live, [1, 5], "as_prefix")
        with grafted(live, folded):
            expected = logits(model, text)
            changed = smoothed(live, tiny_text())
            assert torch.equal(logits(model, text), expected)
            assert changed.keys() <= dict(model.named_parameters()).keys()
        assert not any("attention_bias" in name for name in changed)
        assert torch.equal(logits(model, text), bare)
        again = fold(live, [1, 5], "as_prefix").tensors
        assert all(torch.equal(part, again[name]) for name, part in folded.tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_in_half_precision_holds_it_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    root, out, text = tmp_path / "source", tmp_path / "out", tiny_text(seed=7)
    tiny_model("llama").to(dtype).save_pretrained(root, max_shard_size="40KB")
    layout = read_layout(root)
    assert len(layout.shards) > 1
    with one_thread(), Stage(out) as stage:
        model = load_original(root)
        expected = logits(model, text)
        changed = smoothed(live_of(model), tiny_text())
        for shard in layout.shards:
            inside = {name: value for name, value in changed.items() if layout.tensors[name].shard == shard}
            stage.add_changed(layout, shard, shard, inside)
        for name in ("config.json", INDEX):
            stage.add_file(root / name, name)
        stage.publish()
        assert torch.equal(logits(load_original(out), text), expected)
    written = read_layout(out)
    for name in layout.tensors:
        same = bytes(read_tensor_bytes(written, name)) == bytes(read_tensor_bytes(layout, name))
        assert same is (name not in changed)


def test_a_bias_of_zeros_is_not_said_to_change() -> None:
    model = tiny_model("opt")
    with one_thread(), torch.no_grad():
        model.model.decoder.layers[1].fc1.bias.zero_()
        changed = smoothed(live_of(model), tiny_text())
    assert [name for name in changed if name.endswith("fc1.bias")] == [
        f"model.decoder.layers.{block}.fc1.bias" for block in (0, 2, 3)
    ]


# ---- what is wrong is caught


def verdict_on(model, pair: Pair) -> bool:
    """Whether the proof lets this pair of the first block pass."""
    live, found = live_of(model), []
    trunk, block = live.trunk, live.anatomy.blocks[0]

    def entering(module, args, kwargs):
        def run():
            return module.forward(*args, **kwargs)

        found.append(proved(trunk, block, pair, run, _watched(trunk, block, run), lambda side: True))

    with trunk.get_submodule(block).register_forward_pre_hook(entering, with_kwargs=True):
        logits(model, tiny_text())
    return found[0]


MLP = "layers.0.mlp"
READERS = tuple(f"layers.0.self_attn.{name}_proj" for name in "qkv")


@pytest.mark.parametrize(
    ("model_type", "pair", "right"),
    [
        ("llama", Pair("down", f"{MLP}.up_proj", 0, 48, (f"{MLP}.down_proj",)), True),
        ("llama", Pair("down", f"{MLP}.gate_proj", 0, 48, (f"{MLP}.down_proj",)), False),  # SiLU
        ("phi3", Pair("down", f"{MLP}.gate_up_proj", 0, 48, (f"{MLP}.down_proj",)), False),  # the gate's half
        ("phi3", Pair("down", f"{MLP}.gate_up_proj", 47, 48, (f"{MLP}.down_proj",)), False),  # off by one
        ("llama", Pair("norm", "layers.0.input_layernorm", 0, 32, READERS), True),
        ("llama", Pair("norm", "layers.0.input_layernorm", 0, 32, READERS[:2]), False),  # a reader forgotten
        ("llama", Pair("norm", "layers.0.input_layernorm", 0, 32, (*READERS, f"{MLP}.up_proj")), False),
        ("gemma2", Pair("norm", "layers.0.input_layernorm", 0, 32, READERS), False),  # 1 + w
    ],
)
def test_the_proof_tells_right_pairs_from_wrong_ones(model_type: str, pair: Pair, right: bool) -> None:
    model = any_model(model_type)
    before = parameters(model)
    with one_thread():
        assert verdict_on(model, pair) is right
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


class Reversed(nn.Module):
    """Linear in its rows and as wide, but channel j of what is read is not row j."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states).flip(-1)


def test_channels_in_another_order_are_no_pair() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = Reversed(model.model.layers[1].mlp.up_proj)
    with one_thread():
        found = [pair.source for pair in find(live_of(model)) if pair.kind == "down"]
    assert found == [f"layers.{block}.mlp.up_proj" for block in (0, 2, 3)]


def test_a_down_projection_of_zeros_hides_nothing() -> None:
    model = tiny_model("llama")
    with one_thread(), torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # whatever it reads, the block's output is the same
        found = [pair.source for pair in find(live_of(model)) if pair.kind == "down"]
    assert found == [f"layers.{block}.mlp.up_proj" for block in range(4)]


def test_either_half_of_a_fused_projection_may_be_the_linear_one() -> None:
    model = any_model("phi3")
    mlp = model.model.layers[1].mlp

    def forward(states: torch.Tensor) -> torch.Tensor:
        up, gate = mlp.gate_up_proj(states).chunk(2, dim=-1)
        return mlp.down_proj(up * mlp.activation_fn(gate))

    mlp.forward = forward
    with one_thread():
        found = [pair.start for pair in find(live_of(model)) if pair.kind == "down"]
    assert found == [48, 0, 48, 48]


def test_what_else_reads_a_norm_undoes_the_pair() -> None:
    """A router that is no linear layer reads the second norm of block 1."""

    class Routed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.router = inner, nn.Parameter(torch.randn(32, dtype=torch.float64))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.inner(states) * (states @ self.router).sigmoid()[..., None]

    model = tiny_model("llama")
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp)
    with one_thread():
        norms = {pair.source for pair in find(live_of(model)) if pair.kind == "norm"}
    assert "layers.1.input_layernorm" in norms and "layers.1.post_attention_layernorm" not in norms


def test_shared_weights_are_never_scaled() -> None:
    model, text = tiny_model("llama"), tiny_text(seed=7)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    model.model.layers[1].input_layernorm = model.model.layers[3].input_layernorm
    shared = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with one_thread():
        expected, pairs = logits(model, text), find(live_of(model))
        smoothed(live_of(model), tiny_text())
        assert torch.equal(logits(model, text), expected)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, shared)
    norms = {f"layers.{i}.{name}" for i in range(4) for name in ("input_layernorm", "post_attention_layernorm")}
    shared_ones = {f"layers.{i}.input_layernorm" for i in (1, 3)} | {
        f"layers.{i}.post_attention_layernorm" for i in (0, 2)
    }
    assert {pair.source for pair in pairs} == norms - shared_ones | {"layers.1.mlp.up_proj", "layers.3.mlp.up_proj"}


def test_a_reader_of_a_norm_in_another_block_is_caught() -> None:
    """What reads a norm from another block is caught in the logits."""
    model, kept = tiny_model("llama"), {}
    first, last = model.model.layers[0], model.model.layers[3]
    first.input_layernorm.register_forward_hook(lambda _, args, output: kept.update(states=output))
    last.mlp.register_forward_hook(lambda _, args, output: output + kept["states"])
    before = parameters(model)
    with one_thread(), pytest.raises(UnsupportedModel, match="changed what the model says"):
        smoothed(live_of(model), tiny_text())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_nothing_to_scale_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    with one_thread(), pytest.raises(UnsupportedModel, match="gpt2: no channel can be scaled exactly"):
        smoothed(live_of(model), tiny_text(), kinds=["down"])
    monkeypatch.setattr(smoothing, "MOST", 0)
    with one_thread(), pytest.raises(UnsupportedModel, match="as large as the others"):
        smoothed(live_of(model), tiny_text())


def test_weights_elsewhere_are_refused() -> None:
    model = tiny_model("llama")
    live = live_of(model)
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(UnsupportedModel, match="offloaded"):
        find(live)


# ---- scales

POSITIVE = st.floats(2**-30, 2**30)
MAGNITUDES = hnp.arrays(np.float64, st.integers(1, 12), elements=st.just(0.0) | POSITIVE)


@given(MAGNITUDES, st.data(), st.floats(0, 1))
def test_scales_are_those_of_smoothquant(peak: np.ndarray, data: st.DataObject, strength: float) -> None:
    largest = data.draw(hnp.arrays(np.float64, peak.shape, elements=st.just(0.0) | POSITIVE))
    found = rule(torch.from_numpy(peak), torch.from_numpy(largest), strength).numpy()
    used = (peak > 0) & (largest > 0)
    assert (found[~used] == 0).all() and (np.abs(found) <= 10).all()
    if used.any():
        wanted = peak[used] ** strength / largest[used] ** (1 - strength)
        wanted = np.log2(wanted / np.exp(np.log(wanted).mean()))
        inside = np.abs(wanted) < 10
        assert (np.abs(found[used] - wanted)[inside] <= 0.5 + 1e-9).all()
        assert (np.abs(found[used][~inside]) >= 9).all()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_peaks_are_those_of_the_whole_text(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_model(model_type), tiny_text(rows=3)
    live, read = live_of(model), {}
    trunk = live.trunk
    pairs = find(live)
    with one_thread():
        handles = [
            trunk.get_submodule(pair.readers[-1]).register_forward_pre_hook(
                lambda _, args, pair=pair: read.update({pair: args[0].abs().amax(dim=(0, 1)).numpy()})
            )
            for pair in pairs
        ]
        logits(model, text)
        for handle in handles:
            handle.remove()
        done: list[int] = []
        monkeypatch.setattr("surgery.live.port.LOGIT_BYTES", 1)  # a batch for each row
        found = scales(live, pairs, text, 0.5, lambda count, what: done.append(count))
    assert done == [1, 1, 1]
    for pair, exponents in zip(pairs, found, strict=True):
        weights = [trunk.get_submodule(name).weight.detach().numpy() for name in pair.readers]
        weights = [weight.T if model_type == "gpt2" else weight for weight in weights]
        largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
        wanted = np.log2(np.sqrt(read[pair] / largest))
        np.testing.assert_array_equal(exponents.numpy(), np.rint(wanted - wanted.mean()))


WEIGHTS = hnp.arrays(np.float16, (3, 4), elements=st.floats(-60000, 60000, width=16))


@given(WEIGHTS, st.lists(st.integers(-10, 10), min_size=4, max_size=4), st.sampled_from([-1, 1]))
def test_weights_from_half_precision_stay_in_it(weight: np.ndarray, wanted: list[int], sign: int) -> None:
    tensor = nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False)
    side, before = Side("w", tensor, 1, 0, sign), torch.tensor(wanted)
    exponents = without_loss([side], before)
    assert (exponents.abs() <= before.abs()).all() and (exponents * before >= 0).all()
    after = scaled(side, exponents, side.tensor)
    assert torch.equal(after.half().float(), after)
    np.testing.assert_array_equal(after.double(), tensor.double() * torch.exp2((sign * exponents).double()))
    further = exponents + before.sign() * (exponents != before)
    for channel in (exponents != before).nonzero().flatten().tolist():  # one more would have lost something
        worse = scaled(side, further, side.tensor)[:, channel]
        assert not torch.equal(worse.half().float(), worse)
    original = tensor.clone()
    apply([side], exponents)
    apply([side], -exponents)
    assert torch.equal(tensor, original)
    assert touches(side, exponents) == bool((after != tensor).any())


def test_what_is_no_number_is_left_alone() -> None:
    tensor = nn.Parameter(torch.tensor([[float("nan"), 1.0]]))
    assert without_loss([Side("w", tensor, 1, 0, 1)], torch.tensor([3, 3])).tolist() == [0, 3]


# ---- what it is for


def sampled(model, rows: int, length: int, seed: int) -> torch.Tensor:
    """Text of the model's own making: on it, every deviation from the model costs likelihood."""
    source, text = torch.Generator().manual_seed(seed), torch.full((rows, 1), 5)
    while text.shape[1] < length:
        row = logits(model, text)[:, -1].softmax(dim=-1)
        text = torch.cat([text, torch.multinomial(row, 1, generator=source)], dim=1)
    return text


def test_planted_outliers_cost_nothing_once_smoothed() -> None:
    model = tiny_model("llama")
    live = live_of(model)
    planted = torch.zeros(48, dtype=torch.long)
    planted[5] = -8  # rows by 2^8, columns by 2^-8: the same function, with one channel far above the rest
    with one_thread():
        text, calibrating = sampled(model, 16, 40, seed=0), sampled(model, 8, 40, seed=1)
        for pair in find(live):
            if pair.kind == "down":
                apply(sides(model.model, pair), planted)
        exact = Likelihood()
        stream(live, text, [exact])

        def cost() -> float:
            subject = Subject(live, None, True, text, calibrating, Reporter())
            score = Quantised(w8a8_static={"max_ratio": 2.0}).measure(subject, None).simulated["w8a8_static"][0]
            return score.ppl / exact.score.ppl - 1

        before = cost()
        smoothed(live, calibrating, ["down"])
        after = cost()
    assert before > 1 and abs(after) < 0.02
