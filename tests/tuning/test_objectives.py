"""Objectives against plain float64, and rounding with gradients against what integers and calculus say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from surgery.live.quantised import SCHEMES, Scheme
from surgery.survey.massive import massive as by_survey
from surgery.tuning import objectives
from surgery.tuning.fake_quant import fake_quantised, straight_through
from surgery.tuning.objectives import Objective, Pass

FLOATS = st.floats(-50, 50, allow_subnormal=False)


def a_pass(seed: int, rows: int = 2, tokens: int = 5, words: int = 7, layers: int = 3) -> Pass:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    ids = torch.randint(words, (rows, tokens), generator=source)
    return Pass(ids, draw(rows, tokens, words), [draw(rows, tokens, 4) for _ in range(layers)])


def test_kl_is_the_mean_over_tokens_of_the_teachers_surprise() -> None:
    student, teacher = a_pass(0, tokens=200), a_pass(1, tokens=200)  # more rows than are taken at a time
    p, q = (torch.softmax(x.logits, -1).numpy() for x in (teacher, student))
    assert objectives.kl(student, teacher).item() == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-12)
    assert objectives.kl(teacher, teacher).item() == pytest.approx(0.0, abs=1e-15)


def test_language_modelling_predicts_the_next_token() -> None:
    student = a_pass(2)
    p = torch.softmax(student.logits, -1)
    wanted = -np.mean([np.log(p[b, t, student.tokens[b, t + 1]].item()) for b in range(2) for t in range(4)])
    assert objectives.language_modelling(student).item() == pytest.approx(wanted, rel=1e-12)


def test_hidden_is_the_relative_squared_error() -> None:
    """It is taken over the tokens after the first one."""
    student, teacher = a_pass(3), a_pass(4)
    wanted = np.mean(
        [
            ((x[b, t] - y[b, t]) ** 2).sum() / (y[b, t] ** 2).sum()
            for x, y in zip((h.numpy() for h in student.hidden), (h.numpy() for h in teacher.hidden), strict=True)
            for b in range(2)
            for t in range(1, 5)
        ]
    )
    assert objectives.hidden(student, teacher).item() == pytest.approx(wanted, rel=1e-12)


@given(st.integers(0, 99), st.sampled_from([1.0, 300.0, 3e3, 1e5]))
def test_the_penalty_is_zero_where_nothing_is_massive(seed: int, spike: float) -> None:
    """It is zero exactly where the survey finds no massive activation."""
    student = a_pass(seed, layers=2)
    student.hidden[1][1, 2, 3] *= spike
    found = sum(len(by_survey(states)[0]) for layer in student.hidden for states in layer)
    assert (objectives.massive(student).item() > 0) == (found > 0)


def test_penalties_push_the_largest_activation_down() -> None:
    student = a_pass(5)
    student.hidden[1][0, 0, 0] = 5e4
    for penalty in (objectives.massive, objectives.peak_ratio):
        leaf = student.hidden[1].clone().requires_grad_()
        penalty(Pass(student.tokens, student.logits, [student.hidden[0], leaf])).backward()
        assert leaf.grad[0, 0, 0] > 0
        peaks = (leaf.abs() == leaf.abs().flatten(1).amax(1).view(-1, 1, 1)).detach()
        assert not leaf.grad[~peaks].any()


def test_an_objective_adds_up_what_it_names() -> None:
    student, teacher = a_pass(6), a_pass(7)
    total, parts = Objective({"kl": 2.0, "lm": 0.5})(student, teacher)
    assert total.item() == pytest.approx(2 * parts["kl"] + 0.5 * parts["lm"])
    assert parts["lm"] == pytest.approx(objectives.language_modelling(student).item())
    assert Objective({"lm": 1.0}).needs_teacher is False


@given(hnp.arrays(np.float64, (2, 3, 4), elements=FLOATS), st.integers(2, 8))
def test_rounding_is_that_of_integers_with_a_scale_per_sequence(values: np.ndarray, bits: int) -> None:
    found = straight_through(torch.from_numpy(values), bits).numpy()
    most = 2 ** (bits - 1) - 1
    for row, rounded in zip(values, found, strict=True):
        scale = np.abs(row).max() / most
        if scale > 1e-300:
            np.testing.assert_allclose(rounded, np.clip(np.rint(row / scale), -most, most) * scale, atol=1e-12)
        else:
            np.testing.assert_array_equal(rounded, row)


def test_the_gradient_passes_the_rounding_and_reaches_the_scale() -> None:
    values = torch.tensor([[0.3, -1.1, 2.0]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0, 100.0]], dtype=torch.float64)
    straight_through(values, 3).backward(upstream)
    scale = 2.0 / 3
    steps = values.detach() / scale
    # d/dx of round(x / s) * s, rounding taken for the identity: 1; and d/ds = round(x / s) - x / s, where s = max / 3.
    to_scale = (upstream * (steps.round() - steps)).sum() / 3
    torch.testing.assert_close(values.grad, upstream + torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64) * to_scale)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_gradient_is_the_formulas_with_rounding_held(per_token: bool) -> None:
    """The gradient is that of the formula, with the rounding taken as a constant."""
    source = torch.Generator().manual_seed(0)
    values, upstream = (torch.randn(2, 3, 5, dtype=torch.float64, generator=source) for _ in range(2))
    found, wanted = values.clone().requires_grad_(), values.clone().requires_grad_()
    straight_through(found, 4, per_token).backward(upstream)
    scale = wanted.abs().amax(dim=-1 if per_token else (1, 2), keepdim=True) / 7
    steps = wanted / scale
    ((steps + (steps.round() - steps).detach()) * scale).backward(upstream)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-12)


def test_layers_read_rounded_inputs_only_inside_the_block() -> None:
    layer, x = torch.nn.Linear(4, 2).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    plain = layer(x)
    with torch.no_grad():
        wanted = layer(straight_through(x, 4))
    with fake_quantised({"layer": layer}, SCHEMES["w4a4_static"], 2):
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)
        flat = layer(x.flatten(0, 1))  # as OPT gives it to its MLPs
        torch.testing.assert_close(flat.view_as(wanted), wanted, rtol=0, atol=0)
    with fake_quantised({"layer": layer}, Scheme(4, 4, ranges="per_token"), 2):
        alone = [layer(token[None, None]) for token in x.flatten(0, 1)]
        torch.testing.assert_close(layer(x).flatten(0, 1), torch.cat(alone).flatten(0, 1), rtol=0, atol=1e-15)
        by_token = layer(x)
    for named, expected in (("down", by_token), ("up", wanted)):
        with fake_quantised({"mlp.down": layer}, Scheme(4, 4, per_token=(named,)), 2):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=0)
