"""Recipes: what is accepted, what each key becomes, and that everything else is one sentence with line and key."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from surgery.errors import RecipeError
from surgery.operations import OPERATIONS
from surgery.operations.attention_bias import AttentionBias
from surgery.operations.head_norm import HeadNorm
from surgery.operations.smoothing import Smoothing
from surgery.recipe.file import load
from surgery.steps.recipe import Recipe, load_recipe, parse_recipe
from surgery.tuning.scratch.settings import FromScratch, Pretrain
from surgery.tuning.settings import Lora
from surgery.verification.gates.perplexity import Perplexity
from surgery.verification.verify import Verify

RECIPES = ROOT / "recipes"
KNOWN = ", ".join(dict.fromkeys(kind.name for kind in OPERATIONS))
HEAD = "surgery: 1\noperations:\n"
BASE = HEAD + "  - attention_bias:\n      prefix: auto\n"  # 4 lines


def refusal(text: str) -> str:
    """The sentence that refuses recipe `text`: one printable line that ends in a full stop."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    sentence = str(caught.value)
    assert sentence.startswith("r.yaml") and sentence.endswith(".") and sentence.isprintable(), sentence
    return sentence


def operation(recipe: Recipe, name: str):
    return next(operation for operation in recipe.operations if operation.name == name)


def bias(text: str) -> AttentionBias:
    return parse_recipe(text, "r.yaml").operations[0]


def test_shipped_recipes_load():
    searched = load_recipe(RECIPES / "eab.yaml")
    assert searched.operations[0] == AttentionBias(prefix="auto", max_slots=4, slots_visible="as_prefix")
    given_tokens = load_recipe(RECIPES / "eab-newline.yaml")
    assert given_tokens.operations[0].prefix == (" ", "\n")
    assert searched.verify == given_tokens.verify == Verify()
    quantised = load_recipe(RECIPES / "w8a8-static.yaml")
    assert quantised.operations == given_tokens.operations
    assert list(quantised.verify.quantised.gates()) == ["w8a8_static"]
    streaming = load_recipe(RECIPES / "streaming.yaml")
    assert streaming.verify.streaming.window == 256
    normed = load_recipe(RECIPES / "head-norm.yaml")
    assert (
        operation(normed, "head_norm") == HeadNorm(per_head=True, gate=1)
        and normed.tune.lora == Lora()
        and not normed.exact
    )
    tuned = load_recipe(RECIPES / "eab-tuned.yaml")
    assert (
        operation(tuned, "smoothing") == Smoothing()
        and tuned.tune.quantised == "w8a8_static"
        and tuned.tune.lora is None
    )
    pretrained = load(RECIPES / "gpt2-from-scratch.yaml", FromScratch)
    assert pretrained.pretrain == Pretrain(steps=1000)  # it spells the defaults out
    slots, outliers = (load_recipe(RECIPES / f"encoder-{name}.yaml") for name in ("slots", "outliers"))
    assert slots.reading == outliers.reading == "images" and slots.operations[0].source == "registers"
    assert [one.changes_weights for one in outliers.operations] == [True, False]
    loaded = {
        "clip-text",
        "encoder-slots",
        "encoder-outliers",
        "eab",
        "eab-newline",
        "w8a8-static",
        "streaming",
        "head-norm",
        "eab-tuned",
        "gpt2-from-scratch",
        "hybrid-scratch",
        "w8a8-vllm",
    }
    assert {path.stem for path in RECIPES.glob("*.yaml")} == loaded


def test_operations_come_once_and_in_order():
    def said(*names: str) -> str:
        return refusal("surgery: 1\noperations: [" + ", ".join(f"{name}: {{}}" for name in names) + "]")

    assert "has head_norm too early" in said("head_norm", "attention_bias")
    assert "write them in the order attention_bias, smoothing, head_norm" in said(
        "smoothing", "attention_bias", "head_norm"
    )
    assert "asks for smoothing more than once" in said("attention_bias", "smoothing", "smoothing")
    assert "has smoothing alone" in said("smoothing")


def test_tuning_is_read_back_as_it_was_written():
    text = "surgery: 1\noperations: [attention_bias: {}]\ntune: {steps: 5, lora: {targets: [q_proj]}, batch: 4}"
    recipe = parse_recipe(text, "r.yaml")
    assert recipe.tune.lora.targets == ("q_proj",) and recipe.tune.objectives.weights() == {"kl": 1.0}
    assert Recipe.model_validate(recipe.to_dict()) == recipe
    assert "equivalence" not in recipe.to_dict()["verify"] and "quantised" not in recipe.to_dict()["tune"]
    assert "asks for equivalence" in refusal(text + "\nverify: {equivalence: {max_delta_nll: 1.0e-5}}")
    assert "tune.accumulate is 3, which does not divide the batch of 4" in refusal(text[:-1] + ", accumulate: 3}")
    assert "tune.per_token is of quantised, which is not given" in refusal(text[:-1] + ", per_token: [down_proj]}")


def test_defaults_are_the_documented_ones():
    recipe = parse_recipe("surgery: 1\noperations: [attention_bias: {}]", "r.yaml")
    assert recipe.to_dict() == {
        "surgery": 1,
        "operations": [{"attention_bias": {"prefix": "auto", "max_slots": 4, "slots_visible": "as_prefix"}}],
        "verify": {
            "equivalence": {"max_delta_nll": 1e-5},
            "perplexity": {"max_ratio": 1.01},
            "massive_activations": {"max": 0},
        },
    }


def test_head_norm_alone_and_behind_attention_bias():
    recipe = parse_recipe(NORM, "r.yaml")
    assert recipe.operations == (HeadNorm(per_head=False, gate=0.0, layers="all"),)
    assert recipe.exact and recipe.to_dict()["verify"]["equivalence"] == {"max_delta_nll": 1e-5}
    assert recipe.to_dict()["operations"] == [{"head_norm": {"per_head": False, "gate": 0.0, "layers": "all"}}]
    both = parse_recipe(BASE + "  - head_norm: {per_head: true, gate: 1, layers: [1, 0]}\n", "r.yaml")
    assert [operation.name for operation in both.operations] == ["attention_bias", "head_norm"]
    assert both.operations == (AttentionBias(), HeadNorm(per_head=True, gate=1.0, layers=(1, 0)))
    assert not both.exact and set(both.to_dict()["verify"]) == {"perplexity", "massive_activations"}


def test_a_gate_left_out_keeps_its_default():
    verify = parse_recipe(BASE + "verify: {perplexity: {max_ratio: 1.005}}", "r.yaml").verify
    assert verify == Verify(perplexity=Perplexity(max_ratio=1.005))
    assert verify.equivalence.max_delta_nll == 1e-5 and verify.massive_activations.max == 0
    assert parse_recipe(BASE + "verify: {perplexity: {}}", "r.yaml").verify == Verify()


def test_yaml_is_1_2():
    verify = parse_recipe(BASE + "verify: {equivalence: {max_delta_nll: 1e-4}}", "r.yaml").verify
    assert verify.equivalence.max_delta_nll == 1e-4
    assert bias(BASE.replace("auto", "[no, on, 0o17, 0x10, 1_000, 2020-01-01]")).prefix == (
        "no", "on", 15, 16, 1000, "2020-01-01")  # fmt: skip


def test_tokens_and_ids_keep_their_order_and_kind():
    assert bias(BASE.replace("auto", "[' the', 0, \"\\n\", '1', '<|im_start|>']")).prefix == (
        " the", 0, "\n", "1", "<|im_start|>")  # fmt: skip


def test_an_integer_will_do_for_a_gate_that_is_a_number():
    ratio = parse_recipe(BASE + "verify: {perplexity: {max_ratio: 2}}", "r.yaml").verify.perplexity.max_ratio
    assert ratio == 2.0 and isinstance(ratio, float)


def test_models_are_frozen():
    recipe = parse_recipe(BASE, "r.yaml")
    with pytest.raises(ValidationError):
        recipe.verify.massive_activations.max = 7
    assert hash(recipe) == hash(parse_recipe(BASE, "other.yaml"))
    assert hash(load_recipe(RECIPES / "eab-newline.yaml"))


PREFIX, SLOTS = "operations[0].attention_bias.prefix", "operations[0].attention_bias.max_slots"
VISIBLE, DELTA = "operations[0].attention_bias.slots_visible", "verify.equivalence.max_delta_nll"
NORM = HEAD + "  - head_norm: {}\n"  # 3 lines
GATE, LAYERS = "operations[0].head_norm.gate", "operations[0].head_norm.layers"
ITEM = "      "  # indentation of a key of attention_bias; on line 5 of BASE + ITEM


@pytest.mark.parametrize(
    ("text", "line", "fragments"),
    [
        # whole document
        ("", 1, ["the recipe is empty"]),
        ("# only a comment\n", 1, ["the recipe is empty"]),
        ("[]", 1, ["the recipe is a list", "mapping of surgery, operations, tune, verify"]),
        ("surgery: 1", 1, ["'operations' is missing", "operations: [attention_bias: {prefix: auto}]"]),
        ("# note\noperations: [attention_bias: {}]", 2, ["'surgery' is missing", "add 'surgery: 1'"]),
        ("surgery: 2\noperations: [attention_bias: {}]", 1, ["surgery is 2", "write 'surgery: 1'"]),
        ("surgery: true\noperations: [attention_bias: {}]", 1, ["surgery is true"]),
        ("surgery: 1.0\noperations: [attention_bias: {}]", 1, ["surgery is 1.0"]),
        ("surgery: '1'\noperations: [attention_bias: {}]", 1, ["surgery is '1'"]),
        # unknown and duplicate keys
        ("surgey: 1\noperations: [attention_bias: {}]", 1, ["unknown key 'surgey'", "did you mean 'surgery'?"]),
        (BASE + "verfy: {}", 5, ["unknown key 'verfy'", "did you mean 'verify'?"]),
        (BASE + ITEM + "max_slot: 3", 5, ["unknown key", SLOTS[:-1], "did you mean 'max_slots'?"]),
        (BASE + "verify:\n  perplexty: {}", 6, ["'verify.perplexty'", "did you mean 'perplexity'?"]),
        (BASE + "verify:\n  perplexity: {ratio: 1}", 6, ["'verify.perplexity.ratio'", "did you mean 'max_ratio'?"]),
        (BASE + "verify:\n  <<: {}", 6, ["unknown key 'verify.<<'"]),
        (BASE + '"a\\nb": 1', 5, ["unknown key 'a\\nb'"]),
        (BASE + ITEM + "prefix: auto", 5, [PREFIX, "given twice, first on line 4"]),
        (BASE + "surgery: 1", 5, ["'surgery' is given twice, first on line 1"]),
        (BASE + "verify:\n  perplexity: {}\n  perplexity: {}", 7, ["'verify.perplexity' is given twice"]),
        (BASE + "1: 2", 5, ["a key in the recipe is 1", "keys are plain words"]),
        (BASE + "? [a]\n: 2", 5, ["a key in the recipe is a list or mapping"]),
        # operations
        (HEAD + "  []", 2, ["operations is an empty list"]),
        (HEAD, 2, ["operations is empty; it must be a list"]),
        (HEAD + "  attention_bias: {}", 2, ["operations is a mapping; it must be a list"]),
        (HEAD + "  - attention_bias", 3, ["operations[0] is 'attention_bias'", "write '- attention_bias:"]),
        (HEAD + "  - attention_bias: {from: cls}", 3, ["bias.from is 'cls'; it must be 'registers' or 'mass"]),
        (
            HEAD + "  - attention_bias: {from: registers, prefix: auto}", 3,
            ["attention_bias.from is there, beside which 'prefix' means nothing; remove one"],
        ),
        (HEAD + "  - registers: {neurons: many}", 3, ["neurons is 'many'; it must be 'auto', or a whole number"]),
        (HEAD + "  - attention_bias: {}\n  - registers: {}", 2, ["has attention_bias too early"]),
        (HEAD + "  - attention_bias: {}\n  - attention_bias: {from: registers}", 2, ["for attention_bias more than"]),
        (HEAD + "  - attention_bias:", 3, ["operations[0].attention_bias is empty; it must be a mapping of prefix"]),
        (HEAD + "  - {}", 3, ["operations[0] holds no operation"]),
        (HEAD + "  - head_norm:", 3, ["operations[0].head_norm is empty; it must be a mapping of per_head, gate"]),
        (HEAD + "  - head_nrm: {}", 3, ["unknown operation 'head_nrm'", f"{KNOWN})"]),
        (HEAD + "  - atention_bias: {}", 3, ["did you mean 'attention_bias'?"]),
        (BASE + "    head_norm: {}", 3, ["operations[0] holds several operations", "its own dash"]),
        (BASE + "  - attention_bias: {}", 2, ["attention_bias more than once"]),
        (NORM + "  - head_norm: {}", 2, ["head_norm more than once"]),
        (NORM + "  - attention_bias: {}", 2, ["has head_norm too early", "in the order attention_bias, head_norm"]),
        # head norms
        (NORM.replace("{}", "{gate: 1.5}"), 3, [GATE + " is 1.5; it must be at most 1"]),
        (NORM.replace("{}", "{gate: -0.1}"), 3, [GATE + " is -0.1; it must be at least 0"]),
        (NORM.replace("{}", "{gate: .nan}"), 3, [GATE + " is .nan: a gate that is not a number"]),
        (NORM.replace("{}", "{per_head: 1}"), 3, ["head_norm.per_head is 1; it must be true or false"]),
        (NORM.replace("{}", "{layers: some}"), 3, [LAYERS + " is 'some'; it must be 'all', or a list of numbers"]),
        (NORM.replace("{}", "{layers: []}"), 3, [LAYERS + " is an empty list"]),
        (NORM.replace("{}", "{layers: [0, -1]}"), 3, [LAYERS + "[1] is -1; it must be at least 0"]),
        (NORM.replace("{}", "{layers: [0, 1.5]}"), 3, [LAYERS + "[1] is 1.5, which is not a whole number"]),
        (NORM.replace("{}", "{layers: [2, 2]}"), 3, [LAYERS + " names a layer more than once"]),
        (NORM.replace("{}", "{gate: 1}") + "verify:\n  equivalence: {}", 4, ["verify asks for equivalence", "remove"]),
        # prefix and slots
        (BASE.replace("auto", "Auto"), 4, [PREFIX, "is 'Auto'; it must be 'auto', or a list of tokens"]),
        (BASE.replace("auto", "5"), 4, [PREFIX, "is 5"]),
        (BASE.replace("auto", ""), 4, [PREFIX, "is empty"]),
        (BASE.replace("auto", "[]"), 4, [PREFIX, "is an empty list; it needs at least one entry"]),
        (BASE.replace("auto", "\n       - a\n       - -1"), 6, [PREFIX + "[1] is -1"]),
        (BASE.replace("auto", "\n       - a\n       - true"), 6, [PREFIX + "[1] is true"]),
        (BASE.replace("auto", "[1.0]"), 4, [PREFIX + "[0] is 1.0"]),
        (BASE.replace("auto", "['']"), 4, [PREFIX + "[0] is ''"]),
        (BASE.replace("auto", "[null]"), 4, [PREFIX + "[0] is empty"]),
        (BASE.replace("auto", "[[a]]"), 4, [PREFIX + "[0] is a list"]),
        (BASE.replace("auto", '["\\ud800"]'), 4, [PREFIX + "[0] holds half of a character pair"]),
        (BASE + ITEM + "max_slots: 0", 5, [SLOTS + " is 0; it must be at least 1"]),
        (BASE + ITEM + "max_slots: 17", 5, [SLOTS + " is 17; it must be at most 16"]),
        (BASE + ITEM + "max_slots: true", 5, [SLOTS + " is true, which is not a whole number"]),
        (BASE + ITEM + "max_slots: '3'", 5, [SLOTS + " is '3', which is not a whole number"]),
        (BASE + ITEM + "max_slots: 3.0", 5, [SLOTS + " is 3.0, which is not a whole number"]),
        (BASE + ITEM + "max_slots: null", 5, [SLOTS + " is empty, which is not a whole number"]),
        (BASE.replace("auto", "[1]") + ITEM + "max_slots: 3", 5, [SLOTS, "remove one of them"]),
        (BASE + ITEM + "slots_visible: allways", 5, [VISIBLE, "'as_prefix' or 'always'"]),
        (BASE + ITEM + "slots_visible: true", 5, [VISIBLE + " is true"]),
        # gates
        (BASE + "verify:", 5, ["verify is empty; it must be a mapping"]),
        (BASE + "verify: false", 5, ["verify is false; it must be a mapping"]),
        (BASE + "verify:\n  quantised:", 6, ["verify.quantised is empty; it must be a mapping of w8a8_static"]),
        (BASE + "verify:\n  agreement:", 6, ["verify.agreement is empty; it must be a mapping of min_share"]),
        (BASE + "verify:\n  massive_activations: null", 6, ["verify.massive_activations is empty", "mapping of max"]),
        (BASE + "verify:\n  massive_activations: {max: -1}", 6, ["massive_activations.max is -1", "at least 0"]),
        (BASE + "verify:\n  massive_activations: {max: 0.5}", 6, ["max is 0.5, which is not a whole number"]),
        (BASE + "verify:\n  massive_activations: {max: false}", 6, ["max is false, which is not a whole number"]),
        (BASE + "verify:\n  equivalence:\n    max_delta_nll: 0", 7, [DELTA + " is 0; it must be more than 0"]),
        (BASE + "verify:\n  equivalence:\n    max_delta_nll: -1e-5", 7, [DELTA + " is -1e-05; it must be more than 0"]),
        # what YAML can say and a recipe may not
        (BASE + "x: &a 1\ny: *a", 5, ["anchors and aliases"]),
        (BASE + "x: *a", 5, ["anchors and aliases"]),
        (BASE + "x: !!python/object/apply:os.system [ls]", 5, ["tag", "is not allowed"]),
        (BASE + "x: !!int 3", 5, ["tag", "is not allowed"]),
        ("%YAML 1.1\n---\n" + BASE, 1, ["directives"]),
        (BASE + "---\n" + BASE, 5, ["a second document"]),
        (BASE + "x: " + "[" * 3000, 5, ["nested more than"]),
        (BASE + "x: [", 5, ["not valid YAML"]),
        (BASE + "\tx: 1", 5, ["not valid YAML"]),
        (BASE + "x: \x07", 5, ["not valid YAML"]),
        (BASE + "x: a: b", 5, ["not valid YAML"]),
    ],
)  # fmt: skip
def test_refusals_name_line_and_key(text: str, line: int, fragments: list[str]):
    sentence = refusal(text)
    assert sentence.startswith(f"r.yaml, line {line}: "), sentence
    for fragment in fragments:
        assert fragment in sentence


NOT_NUMBERS = [".nan", ".inf", "-.inf", "1e999", "'1e-5'", "small", "true", "null", "[1]", "9" * 400, "9" * 5000]


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("gate", ["equivalence: {max_delta_nll: %s}", "perplexity: {max_ratio: %s}"])
def test_a_gate_that_is_not_a_number_is_refused(gate: str, value: str):
    sentence = refusal(BASE + "verify:\n  " + gate % value)
    assert sentence.startswith("r.yaml, line 6: verify.") and "a gate that is not a number" in sentence


def test_first_error_is_told_and_the_others_counted():
    sentence = refusal(BASE + ITEM + "max_slots: 0\nverify:\n  perplexity: {max_ratio: no}\nextra: 1")
    assert "line 5:" in sentence and "max_slots" in sentence and sentence.endswith("(and 2 further errors).")
    assert refusal("surgery: 3").endswith("(and 1 further error).")


def test_a_flood_of_text_is_refused_quickly():
    assert "longer than 64 KiB" in refusal(" " * 70_000)


def test_load_recipe_names_the_file(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"missing\.yaml: no such file; give the path of a recipe"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"surgery: 1\n# caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml, line 2: not UTF-8 text"):
        load_recipe(latin)
    large = tmp_path / "large.yaml"
    large.write_bytes("é".encode() * 70_000)
    with pytest.raises(RecipeError, match="longer than 64 KiB"):
        load_recipe(large)
    marked = tmp_path / "windows.yaml"
    marked.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_recipe(marked) == parse_recipe(BASE, "r.yaml")


def as_yaml(value: object) -> str:
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(value, stream)
    return stream.getvalue()


characters = st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFF)  # JSON escapes the others in two halves
tokens = st.lists(st.one_of(st.integers(0, 2**40), st.text(characters, min_size=1, max_size=8)), min_size=1, max_size=6)
gates = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
searches = st.builds(
    AttentionBias, max_slots=st.integers(1, 16), slots_visible=st.sampled_from(["as_prefix", "always"])
)
biases = st.one_of(searches, st.builds(AttentionBias, prefix=tokens))
layers = st.one_of(st.just("all"), st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
norms = st.builds(HeadNorm, per_head=st.booleans(), gate=st.floats(0, 1), layers=layers)
recipes = st.builds(
    Recipe,
    surgery=st.just(1),
    operations=st.one_of(st.tuples(biases), st.tuples(norms), st.tuples(biases, norms)),
    verify=st.builds(Verify, perplexity=st.builds(Perplexity, max_ratio=gates)),
)


@given(recipes)
def test_to_dict_is_plain_json_and_reads_back(recipe: Recipe):
    plain = recipe.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert Recipe.model_validate(json.loads(json.dumps(plain))) == recipe
    assert parse_recipe(json.dumps(plain, ensure_ascii=True), "r.yaml") == recipe  # JSON is YAML 1.2


@given(st.one_of(st.integers(), st.floats()))
def test_max_slots_takes_whole_numbers_from_1_to_16_only(value: float):
    text = BASE + ITEM + "max_slots: " + as_yaml(value).removesuffix("...\n")
    if isinstance(value, int) and 1 <= value <= 16:
        assert bias(text).max_slots == value
    else:
        assert SLOTS in refusal(text)


@given(st.floats())
def test_a_gate_takes_finite_positive_numbers_only(value: float):
    text = BASE + "verify: {perplexity: {max_ratio: " + as_yaml(value).removesuffix("\n...\n") + "}}"
    if math.isfinite(value) and value > 0:
        assert parse_recipe(text, "r.yaml").verify.perplexity.max_ratio == value
    else:
        assert "verify.perplexity.max_ratio" in refusal(text)


words = st.one_of(
    st.sampled_from(["surgery", "operations", "verify", "attention_bias", "prefix", "perplexity", "max"]),
    st.text(characters, max_size=8),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words)
json_like = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)


@given(json_like)
@example({"surgery": 1, "operations": [{"attention_bias": {"prefix": {"a": []}}}], "verify": {"perplexity": []}})
def test_any_structure_parses_or_is_refused_in_one_sentence(value: object):
    try:
        parse_recipe(json.dumps(value), "r.yaml")
    except RecipeError as error:
        assert str(error).isprintable() and str(error).endswith(".")


@given(st.text(st.sampled_from("surgey: 1\n-[]{}&*!%'\"#|>?,\\0xU_.~=<\t@`\x85\ufeff"), max_size=60))
def test_any_text_parses_or_is_refused_in_one_sentence(text: str):
    try:
        parse_recipe(text, "r.yaml")
    except RecipeError as error:
        assert str(error).isprintable() and str(error).endswith(".")


def test_only_int8_can_be_executed_and_only_said_so_in_a_word():
    gates = parse_recipe(
        BASE + "verify: {quantised: {w8a8_static: {max_ratio: 2, executed: true}, w8a8_dynamic: {max_ratio: 2}}}", "r"
    ).verify.quantised
    assert gates.executed() == ("w8a8_static",)
    for wrong, said in {
        "{w4: {max_ratio: 2, executed: true}}": r"unknown key 'verify.quantised.w4.executed'; known here: max_ratio",
        "{w8a8_static: {max_ratio: 2, executed: 1}}": r"executed is 1; it must be true or false",
        "{w8a8_static: {executed: true}}": r"the key 'max_ratio' is missing",
        "{w8a8_static: {max_ratio: a}}": r"a gate that is not a number",
    }.items():
        with pytest.raises(RecipeError, match=said):
            parse_recipe(BASE + f"verify: {{quantised: {wrong}}}", "r")
    with pytest.raises(RecipeError, match="which is not a whole number"):
        parse_recipe(BASE + "verify: {streaming: {window: a, max_ratio: 2}}", "r")
