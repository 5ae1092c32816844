"""Head norms on live tiny models in float64: exact at gate 0 in every family, else the plain formula; and their fit."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from helpers.families import EXACT, PREFIX, behind, families, in_tiers
from helpers.tiny import build, live_of, one_thread, tiny_model, tiny_text
from helpers.ways import LENGTH, WAYS

from surgery.anatomy.calls import observing
from surgery.anatomy.linears import linears
from surgery.anatomy.sites import examine
from surgery.errors import SourceError, UnsupportedModel
from surgery.live.graft import EPS, Fold, Norms, at_gate, fold, grafted, installed, norm_shapes, normed, on_the_seam
from surgery.live.model import Live
from surgery.live.places import normed_sites
from surgery.live.stream import stream
from surgery.operations.head_norm import HeadNorm as Recipe
from surgery.operations.head_norm import fit_norms, least_squares, norm_values
from surgery.runtime.eab_head_norm import HeadNorm
from surgery.survey.attention import Selection, ValueVariance
from surgery.verification.equivalence import compare_random_ids, take_control

# These compute their softmax in float32 even in a float64 model; the runtime does not.
ROUNDED = {
    "bloom", "codegen", "flint", "gemma2", "gpt_neo", "gptj", "granite_swa", "granitemoe_swa", "mpt", "vaultgemma",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


def random_norms(head_norm: dict, gate: float, seed: int = 0) -> Norms:
    source = torch.Generator().manual_seed(seed)
    return {
        site: {
            part: torch.full(shape, gate, dtype=torch.float64)
            if part == "gate"
            else 0.5 + torch.rand(shape, generator=source, dtype=torch.float64)
            for part, shape in shapes.items()
        }
        for site, shapes in norm_shapes(head_norm).items()
    }


def weights_of(norms: Norms) -> Norms:
    return {site: {"weight": values["weight"]} for site, values in norms.items()}


@contextlib.contextmanager
def with_norms(live, head_norm: dict, norms: Norms):
    """No slots, norms in place."""
    with installed(live, live.anatomy.eab(0, "as_prefix"), {}), normed(live, head_norm, norms):
        yield


# ---- gate 0


@pytest.mark.parametrize("kind", in_tiers(EXACT))
def test_at_gate_0_every_family_is_what_it_was(kind):
    """However the text is fed; and not by doing nothing: at gate 1 it is another model."""
    family = families()[kind]
    text = tiny_text(2, LENGTH)
    with family.default_dtype(), torch.inference_mode():
        config = family.config()
        live = Live(build(config), examine(config.to_dict()))
        native = {how: WAYS[how](live.model, text) for how in ("plain", "padded", "cached")}
        size = native["plain"].abs().max()
        head_norm = Recipe(per_head=True).described(live.anatomy)
        norms = random_norms(head_norm, 0.0)
        with installed(live, live.anatomy.eab(0, "as_prefix"), {}):
            without = WAYS["plain"](live.model, text)
            with normed(live, head_norm, norms):
                assert torch.equal(WAYS["plain"](live.model, text), without)
                for how, expected in native.items():
                    if expected is None or bool(expected.isnan().any()):  # no cache; some break on padding
                        continue
                    exact = kind not in ROUNDED and expected.dtype == torch.float64
                    distance = (WAYS[how](live.model, text) - expected).abs().max()
                    assert distance < (1e-12 if exact else 5e-6) * size, how
            with normed(live, *at_gate(head_norm, norms, 1.0)):
                opened = WAYS["plain"](live.model, text)
                assert (opened - without).abs().max() > 1e-2 * size
            with normed(live, {**head_norm, "gated": False}, weights_of(norms)):
                assert torch.equal(WAYS["plain"](live.model, text), opened), "a gate of 1 is a pure norm"
        assert torch.equal(WAYS["plain"](live.model, text), native["plain"]), "the norms were not taken out again"


def test_random_ids_reveal_a_norm_that_is_not_neutral():
    """The comparison on random ids sees a norm that is not neutral."""
    model = tiny_model("llama")
    live, operation = live_of(model), Recipe(gate=1.0)
    head_norm = operation.described(live.anatomy)
    norms = random_norms(head_norm, 1.0)
    for prefix in ((), PREFIX):
        control = take_control(live, prefix)
        with grafted(live, fold(live, prefix, "as_prefix")), operation.graft(live, norms):
            found = compare_random_ids(live, control)
        assert max(found.plain, found.padded, found.cached) < 1e-4
    control, open_a_crack = take_control(live, ()), at_gate(head_norm, norms, 0.01)
    with grafted(live, Fold((), {}, "as_prefix")), normed(live, *open_a_crack):
        with pytest.raises(UnsupportedModel, match="the converted model differs from the original by"):
            compare_random_ids(live, control)


# ---- against a plain reference


def reference(live, head_norm: dict, norms: Norms, text: torch.Tensor) -> torch.Tensor:
    """Logits of the unchanged model in its own attention, with norms written in numpy at each output projection."""
    trunk = live.trunk
    with contextlib.ExitStack() as undo:
        for name, (heads, dim) in head_norm["sites"].items():
            weight, gate = norms[name]["weight"].numpy(), norms[name].get("gate")
            gate = np.ones(1) if gate is None else gate.numpy()[:, None]

            def norm(_, args, heads=heads, dim=dim, weight=weight, gate=gate):
                states = args[0].numpy().reshape(*args[0].shape[:2], heads, dim)
                unit = states / np.sqrt((states**2).mean(axis=-1, keepdims=True) + EPS)
                states = (1 - gate) * states + gate * unit * weight
                return (torch.from_numpy(states.reshape(args[0].shape)),)

            site = trunk.get_submodule(name)
            known = ("o_proj", "c_proj", "dense", "out_proj", "linear_out")
            projection = next(getattr(site, part) for part in known if hasattr(site, part))
            undo.callback(projection.register_forward_pre_hook(norm).remove)
        return live.model(input_ids=text, use_cache=False).logits


@pytest.mark.parametrize("settings", [{"per_head": True, "gate": 1.0}, {"layers": (0, 2), "gate": 0.4}])
@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "opt", "falcon", "bloom", "gptj", "gemma3_text", "deepseek_v3", "gpt_oss", "phi"]
)
def test_norms_are_the_formulas_at_the_output_projection(kind, settings):
    """Grouped heads, adapters, value dims unlike key dims (DeepSeek), sink logits: the reference knows none of it."""
    family = families()[kind]
    with family.default_dtype(), torch.inference_mode():
        config, text = family.config(), tiny_text(2, LENGTH)
        live = Live(build(config), examine(config.to_dict()))
        head_norm = Recipe(**settings).described(live.anatomy)
        assert len(head_norm["sites"]) == len(settings.get("layers", range(4)))
        norms = random_norms(head_norm, settings["gate"])
        with with_norms(live, head_norm, norms):
            found = {how: way(live.model, text) for how, way in WAYS.items() if how in ("plain", "eager")}
        expected = reference(live, head_norm, norms, text)
    tolerance = 5e-6 if kind in ROUNDED else 1e-10
    for how, logits in found.items():
        assert (logits - expected).abs().max() < tolerance * expected.abs().max(), how


def test_norms_behind_slots_are_those_behind_the_prefix():
    model = tiny_model("gemma3_text")
    live, text = live_of(model), tiny_text(2, LENGTH)
    head_norm = Recipe(per_head=True, gate=1.0).described(live.anatomy)
    norms = random_norms(head_norm, 1.0)
    with torch.inference_mode():
        with with_norms(live, head_norm, norms):
            control = model(input_ids=behind(text), use_cache=False).logits[:, len(PREFIX) :]
            slots = {}
            # Slots of the normed model: its prefix is normed too, unlike that of the original.
            with observing(lambda call: slots.setdefault(call.module, call)):
                model(input_ids=torch.tensor([PREFIX]), use_cache=False)
        trunk = live.trunk
        folded = {
            f"{site.name}.attention_bias.{name}": part[0].transpose(0, 1).contiguous()
            for site in live.anatomy.sites
            for call in [slots[trunk.get_submodule(site.name)]]
            for name, part in (("key", call.key), ("value", call.value))
        }
        with grafted(live, Fold(tuple(PREFIX), folded, "as_prefix")), normed(live, head_norm, norms):
            found = model(input_ids=text, use_cache=False).logits
    assert (found - control).abs().max() < 1e-5 * control.abs().max()


# ---- the module


def test_half_precision_is_normed_in_float32():
    norm = HeadNorm(2, 8, per_head=True, gated=True, eps=EPS)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(2, 8, generator=source))
        norm.gate.copy_(torch.tensor([0.25, 1.0]))
    states = (300 * torch.randn(1, 5, 2, 8, generator=source)).to(torch.float16)  # squares overflow float16
    wide = states.double()
    unit = wide / (wide.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * norm.weight.double()
    expected = wide + norm.gate.double()[:, None] * (unit - wide)
    found = norm(states)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected.to(torch.float16), rtol=2e-3, atol=0)


@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_are_those_of_finite_differences(per_head):
    norm = HeadNorm(2, 4, per_head=per_head, gated=True, eps=EPS).double()
    source = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=source, dtype=torch.float64, requires_grad=True)
              for shape in ((2, 3, 2, 4), norm.weight.shape, norm.gate.shape)]  # fmt: skip

    def function(states, weight, gate):
        return torch.func.functional_call(norm, {"weight": weight, "gate": gate}, states)

    assert torch.autograd.gradcheck(function, inputs)


def test_a_norm_of_other_dims_than_attention_gives_raises():
    norm = HeadNorm(2, 8, per_head=False, gated=False, eps=EPS)
    with pytest.raises(ValueError, match=r"\(4, 8\) heads and dims, and the norm is of \(2, 8\)"):
        norm(torch.zeros(1, 3, 4, 8))
    assert norm.gate is None and list(norm.state_dict()) == ["weight"]
    assert bool(norm.weight.isnan().all()), "never uninitialised memory"


def test_an_attribute_in_the_way_is_refused(monkeypatch):
    kind = type(tiny_model("llama").model.layers[0].self_attn)
    monkeypatch.setattr(kind, "head_norm", None, raising=False)
    with pytest.raises(UnsupportedModel, match="already has an attribute head_norm"):
        examine(tiny_model("llama").config.to_dict())


# ---- the fit


def heads_of(live, text: torch.Tensor) -> dict[str, np.ndarray]:
    """Site name -> what its heads bring back, (tokens, Hq, E)."""
    trunk = live.trunk
    names = {trunk.get_submodule(site.name): site.name for site in live.anatomy.sites}
    found = {}

    def keep(call, output):
        found[names[call.module]] = output.flatten(0, 1).numpy()

    with torch.inference_mode(), on_the_seam(live), observing(None, keep):
        live.model(input_ids=text, use_cache=False)
    return found


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "bloom"])
@pytest.mark.parametrize("per_head", [False, True])
def test_weights_are_the_least_squares_of_every_dim(kind, per_head):
    family = families()[kind]
    with family.default_dtype():
        config = family.config()
        live, text = Live(build(config), examine(config.to_dict())), tiny_text(3, LENGTH)
        head_norm = Recipe(per_head=per_head).described(live.anatomy)
        norms, residual = fit_norms(live, head_norm, 0.0, text)
        left = whole = 0.0
        for site, states in heads_of(live, text).items():
            unit = states / np.sqrt((states**2).mean(axis=-1, keepdims=True) + EPS)
            expected = np.empty(states.shape[1:])
            for head, dim in np.ndindex(*expected.shape):
                rows = [head] if per_head else slice(None)
                a, b = unit[:, rows, dim].reshape(-1, 1), states[:, rows, dim].reshape(-1)
                expected[head, dim] = np.linalg.lstsq(a, b, rcond=None)[0][0]
            weight = norms[site]["weight"].numpy()
            assert weight.dtype == np.float32 and weight.shape == (expected.shape if per_head else expected.shape[1:])
            np.testing.assert_allclose(np.broadcast_to(weight, expected.shape), expected, rtol=1e-6)
            assert bool((norms[site]["gate"] == 0).all()) and norms[site]["gate"].shape == states.shape[1:2]
            left, whole = left + ((states - unit * expected) ** 2).sum(), whole + (states**2).sum()
        assert residual == pytest.approx(left / whole, rel=1e-6)
        assert 0.001 < residual < 1


def test_the_fit_is_made_behind_the_slots():
    model = tiny_model("llama")
    live, text = live_of(model), tiny_text(2, LENGTH)
    head_norm = Recipe(per_head=True).described(live.anatomy)
    with grafted(live, fold(live, PREFIX, "as_prefix")):
        norms, _ = fit_norms(live, head_norm, 0.0, text)
    states = heads_of(live, behind(text))["layers.3.self_attn"]
    states = states.reshape(len(text), -1, *states.shape[1:])[:, len(PREFIX) :].reshape(-1, *states.shape[1:])
    unit = states / np.sqrt((states**2).mean(axis=-1, keepdims=True) + EPS)
    expected = (unit * states).sum(axis=0) / (unit**2).sum(axis=0)
    np.testing.assert_allclose(norms["layers.3.self_attn"]["weight"].numpy(), expected, rtol=1e-5)


def test_dead_dims_take_the_scale_of_head_then_site_then_1():
    """Dims that never were active take the scale of their head, else of their site, else 1."""
    products = torch.tensor([[6.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    squares = torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert least_squares(products, squares, per_head=True).tolist() == [[3.0, 1.0, 2.0], [2.0, 2.0, 2.0]]
    assert least_squares(products, squares, per_head=False).tolist() == [3.0, 1.0, 2.0]
    nothing = torch.zeros(2, 3)
    assert least_squares(nothing, nothing, per_head=True).tolist() == [[1.0] * 3] * 2


def test_a_layer_that_is_not_there_is_refused():
    anatomy = examine(tiny_model("llama").config.to_dict())
    with pytest.raises(SourceError, match="there is no layer 4, the last of 4 is 3; they are counted from 0"):
        Recipe(layers=(1, 4)).described(anatomy)
    assert list(Recipe(layers=(3, 1)).described(anatomy)["sites"]) == ["layers.1.self_attn", "layers.3.self_attn"]


def test_norms_that_would_change_nothing_are_refused():
    """One dim per head: o / |o| * weight; and with all of one size, norms are the identity."""
    model = tiny_model("llama")
    live = live_of(model)
    with torch.no_grad():
        for layer in model.model.layers:  # the same value for every token: every mean of values is that value
            layer.input_layernorm.weight.zero_()
            layer.self_attn.v_proj.bias = torch.nn.Parameter(torch.linspace(1, 2, 16, dtype=torch.float64))
    with pytest.raises(UnsupportedModel, match="norms would change nothing"):
        fit_norms(live, Recipe(per_head=True).described(live.anatomy), 1.0, tiny_text(2, LENGTH))


def test_a_gate_is_only_dropped_where_it_is_1():
    model = tiny_model("llama")
    live = live_of(model)
    pure = Recipe(gate=1.0).described(live.anatomy)
    gated, norms = at_gate(pure, random_norms(pure, 1.0), 1.0)
    assert set(Recipe(gate=1.0).tensors(live, norms)) == {
        f"model.layers.{i}.self_attn.head_norm.weight" for i in range(4)
    }
    assert len(norm_values(gated, norms)) == 8
    norms["layers.2.self_attn"]["gate"][1] = 0.99
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn has a gate that is not 1"):
        norm_values(pure, norms)


def test_norms_are_no_weights_to_quantise():
    model = tiny_model("llama")
    live = live_of(model)
    head_norm, before = Recipe(per_head=True).described(live.anatomy), list(linears(model, live.anatomy))
    with with_norms(live, head_norm, random_norms(head_norm, 0.0)):
        assert list(linears(model, live.anatomy)) == before


# ---- what a survey sees


def surveyed(live, text: torch.Tensor) -> dict[str, list]:
    """Rows of variance and selection of block 0, by key."""
    variance, selection = ValueVariance(), Selection()
    stream(live, text, [variance, selection])
    return {**variance.rows()[1], **selection.rows()[1]}


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_survey_sees_variance_after_the_norm(kind):
    """A survey sees the variance after the norm, and the selection before it."""
    family, text = families()[kind], tiny_text(2, LENGTH)
    with family.default_dtype():
        config = family.config()
        live = Live(build(config), examine(config.to_dict()))
        head_norm = Recipe(gate=1.0).described(live.anatomy)
        norms = {site: {"weight": torch.ones(dim).double()} for site, (_, dim) in head_norm["sites"].items()}
        before, heads = surveyed(live, text), heads_of(live, text)[live.anatomy.sites[0].name]
        assert normed_sites(live) == 0
        with with_norms(live, head_norm, norms):
            after = surveyed(live, text)
            assert normed_sites(live) == 4
    unit = heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + EPS)
    variance = unit.var(axis=-1).reshape(2, LENGTH, -1)
    np.testing.assert_allclose(after["value_variance_first"], variance[:, 0].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(after["value_variance_rest"], variance[:, 1:].mean(axis=(0, 1)), rtol=1e-6)
    assert not np.allclose(before["value_variance_first"], after["value_variance_first"], rtol=0.1)
    for key in ("separability", "attended_share", "selection_distance"):  # nearness to sums of values, not to norms
        np.testing.assert_allclose(after[key], before[key], rtol=1e-6)
