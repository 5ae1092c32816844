"""A model with slots is compiled, copied and trained like any other."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers.pair import derived_model, pair_of, worst
from helpers.tiny import one_thread, tiny_text
from transformers import StaticCache


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_this_module():
    with one_thread():
        yield


@pytest.mark.slow
def test_compiled_forward_and_decoding_step():
    model, ids = derived_model(), tiny_text()
    expected = pair_of("llama").control(ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert worst(compiled(input_ids=ids, use_cache=False).logits, expected) < 1e-5
        cache = StaticCache(model.config, max_cache_len=64)
        start = model(input_ids=ids[:, :38], past_key_values=cache).logits
        steps = [compiled(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in (38, 39)]
        assert worst(torch.cat([start, *steps], 1), expected) < 1e-5
        # Tracing cannot see whether positions start again; what runs must.
        numbered = compiled(input_ids=ids, position_ids=torch.arange(40)[None], use_cache=False).logits
        assert worst(numbered, expected) < 1e-5
        with pytest.raises(RuntimeError, match="packed sequences"):
            compiled(input_ids=ids, position_ids=torch.arange(20).repeat(2)[None], use_cache=False)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_training_step_gives_the_plain_gradients():
    model, ids = derived_model(), tiny_text(2, 12)
    names = [name for name, _ in model.named_parameters() if name.endswith("self_attn.attention_bias.key")]
    torch._dynamo.reset()
    gradients = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([model.get_parameter(name).grad.clone() for name in names])
    torch._dynamo.reset()
    assert len(names) == 4 and all(gradient.abs().max() > 0 for gradient in gradients[0])
    assert max(worst(a, b) for a, b in zip(*gradients, strict=True)) < 1e-5


def test_copies_are_whole_and_independent():
    model, ids = derived_model(), tiny_text()
    expected = pair_of("llama").control(ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    model.config._attn_implementation_internal = "sdpa"  # the original is broken now; the copies must not notice
    with torch.no_grad():
        model.model.layers[0].self_attn.attention_bias.key.fill_(torch.nan)
        for other in copies:
            assert worst(other(input_ids=ids).logits, expected) < 1e-5


def test_training_the_slots_with_peft_changes_them_alone():
    peft = pytest.importorskip("peft")
    model, ids = derived_model(), tiny_text()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        untrained = model(input_ids=ids).logits
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["attention_bias"], r=2)
    )
    tuned.train()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert tuned(input_ids=ids, labels=ids).loss < loss
        with tuned.disable_adapter():
            assert worst(tuned(input_ids=ids).logits, untrained) < 1e-9
    after = tuned.merge_and_unload().state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".attention_bias." in name}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the name that users know
def test_training_mode_takes_the_same_function():
    """Gradients, checkpointing and a frozen model in train() all give the logits of evaluation."""
    model, ids = derived_model("qwen2"), tiny_text()
    expected = pair_of("qwen2").control(ids)
    model.train()
    assert worst(model(input_ids=ids).logits.detach(), expected) < 1e-5
    model.gradient_checkpointing_enable()
    out = model(input_ids=ids, position_ids=torch.arange(40)[None], labels=ids)
    out.loss.backward()
    assert worst(out.logits.detach(), expected) < 1e-5
    assert model.model.layers[0].self_attn.attention_bias.value.grad.abs().max() > 0
    model.requires_grad_(False)
    assert worst(model(input_ids=ids).logits, expected) < 1e-5
