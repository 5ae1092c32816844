"""The parts that may be added to a model, and the model types that say so."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import LlamaForCausalLM

from surgery.anatomy.classes import CAUSAL
from surgery.converted import parts
from surgery.converted.derived import NORM_FILE, derive
from surgery.converted.parts import NORMS, REGISTERS, SLOTS, Converted, converted_from, converted_type

TYPES = {
    "eab_llama": ({SLOTS}, "Eab"),
    "eab_norm_llama": ({SLOTS, NORMS}, "EabNorm"),
    "eab_registers_llama": ({SLOTS, REGISTERS}, "EabRegisters"),
    "eab_norm_registers_llama": ({SLOTS, NORMS, REGISTERS}, "EabNormRegisters"),
}


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_tells_its_base_and_parts(model_type):
    added, prefix = TYPES[model_type]
    assert converted_from(model_type) == Converted("llama", frozenset(added))
    assert converted_type(*converted_from(model_type)) == model_type
    derived = derive(*converted_from(model_type))
    assert (derived.model_type, derived.base, derived.parts) == (model_type, "llama", frozenset(added))
    assert derived.classes[CAUSAL] == f"{prefix}LlamaForCausalLM" == derived.name_of(LlamaForCausalLM)
    assert (NORM_FILE in derived.files()) == (NORMS in added)


def test_norms_stand_on_what_installs_slots():
    assert derive("llama", frozenset({NORMS})) is derive("llama", frozenset({SLOTS, NORMS}))


@pytest.mark.parametrize("other", ["llama", "eab", "", None, 7, ["eab_llama"]])
def test_other_types_are_not_converted(other):
    assert converted_from(other) is None


def test_an_unknown_part_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="'states' is not a part; there are slots, norms"):
        derive("llama", frozenset({"states"}))


def test_a_further_part_is_one_more_entry(monkeypatch):
    entry = dataclasses.replace(
        parts.PARTS[NORMS], infix="state_", title="State", file="eab_head_norm", mixin="StateMixin", summary="states"
    )
    monkeypatch.setitem(parts.PARTS, "states", entry)
    found = converted_from("eab_norm_state_llama")
    assert found == Converted("llama", frozenset({SLOTS, NORMS, "states"}))
    derived = derive(*found)
    assert derived.model_type == "eab_norm_state_llama"
    assert "class EabNormStateLlamaForCausalLM(HeadNormMixin, StateMixin, LlamaForCausalLM):" in derived.source
    assert "from .eab_head_norm import HeadNormMixin, StateMixin\nfrom .eab_runtime import inherit_" in derived.source
