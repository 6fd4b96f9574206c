"""Regular expressions out of files mean what Python's `re` says, and take no time that a stranger can choose."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alnico
from alnico.checkpoint import patterns
from alnico.checkpoint.open_adapter import open_adapter
from alnico.checkpoint.patterns import PatternError, check_pattern, fits
from alnico.errors import ModelError, RecipeError
from hostile.malformed import save, save_json

LANGUAGE = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|"
    r"down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|up_proj)))"
)
REAL = (
    r"^(?!.*visual).*(q_proj|v_proj)$",
    r"^(model\.language_model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))$",
    r"^(?:model\.language_model|language_model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(.*\.)?(.*\.experts\.gate_up_proj)$",
    r"(?i)LAYERS\.(?P<layer>[0-3]|1\d)\..*MLP",
    r"\bq_proj\b|(?<!gate_)up_proj",
    LANGUAGE,
)
NAMES = [
    f"{before}layers.{i}.{module}"
    for before in ("", "model.", "model.language_model.", "visual.", "decoder.block.")
    for i in (0, 3, 12)
    for module in (
        "self_attn.q_proj",
        "mlp.up_proj",
        "mlp.gate_up_proj",
        "SelfAttention.q",
        "mlp.experts.gate_up_proj",
        "n\u00e4me",
    )
]
SLOW = (
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*a){20}b", "a*a*a*a*a*a*a*b", "(?:a{1000}){1000}", "(?:(?:a?){1000}){1000}b", "(x+x+|a+a+)+y",
    "((((a*)*)*)*)*b", "(?:aa|aa)" * 40 + "b", "(?=(a+)+b)", "(?!(a+)+b)c", "(?<=b)(a+)+b", "(?:){4294967294}b", "(.*.*.*.*)*b", "(?i:(A+)+)b",
    "(?:(?:a{0,9}){0,9}){0,9}b", "a?" * 400 + "a" * 400, "(a*?)*?b", r"(\w+\.?)+b", r"([^.]+\.?)*b",
)  # fmt: skip
"""Each takes `re` exponential time, or a high power of the length, on a name of a hundred letters that it does not fit."""

ATOMS = (
    "a", "b", ".", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", "^", "$", r"\b", r"\B", r"\A", r"\Z", "", "(?i:A)", "(?s:.)", "(?m:^)", "(?m:$)",
    "(?a:\\w)", "\u00e9", "(?!)",
)  # fmt: skip
EXPRESSIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(("*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{2,}"))).map(
            lambda x: f"(?:{x[0]}){x[1]}"
        ),
        st.tuples(st.sampled_from(("?=", "?!", "?<=", "?<!")), inner).map(lambda x: f"({x[0]}{x[1]})"),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS, st.lists(st.text("ab1.\n\u00e9A", max_size=7), min_size=1, max_size=4))
def test_a_pattern_means_what_re_says(pattern: str, names: list[str]) -> None:
    try:
        plain = re.compile(pattern)
    except re.error:
        with pytest.raises(PatternError, match="is not a regular expression"):
            check_pattern(pattern)
        return
    made = patterns._pattern(pattern)
    made._is_quick = False  # else `re` itself may be asked
    for name in names:
        for how in ("search", "match", "fullmatch"):
            assert made.fits(name, how) == (getattr(plain, how)(name) is not None), (pattern, name, how)


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_adapters_and_recipes_mean_what_re_says(pattern: str) -> None:
    for how in ("search", "match", "fullmatch"):
        found = [fits(pattern, name, how) for name in NAMES]
        assert found == [getattr(re, how)(pattern, name) is not None for name in NAMES]
    assert any(fits(pattern, name) for name in NAMES)


def test_a_pattern_takes_no_time_that_a_stranger_can_choose() -> None:
    """In a process of its own, as nothing ends a match of `re`."""
    code = (
        "from alnico.checkpoint.patterns import fits\n"
        f"for pattern in {SLOW!r}:\n"
        "    for end in ('!', 'c', '.c'):\n"
        "        assert [fits(pattern, 'a' * n + end, how) for n in (97, 98) for how in ('search', 'match', 'fullmatch')] is not None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(", r"is not a regular expression \("),
        ("(?<=a+)b", r"is not a regular expression \(look-behind requires fixed-width pattern\)"),
        ("a{9999999999}", "is not a regular expression"),
        ("(?L)a", "is not a regular expression"),
        ("(" * 5_000 + ")" * 5_000, "is not a regular expression|nested deeper than 50"),
        ("(" * 60 + "a*b*" + ")" * 60, "nested deeper than 50"),
        ("a" * 10_001, r"has 10,001 characters; at most 10,000 are read"),
        ("(?i)" + "[\u0100-\uffff]" * 30, "sets of characters that are too large"),
        (r"(a*)(b*)\1", "a reference to a group"),
        ("(?>a*)b*", "an atomic group"),
        ("a*+b*", "a possessive repetition"),
        ("(a)?b*(?(1)c|d*)", "a reference to a group"),
    ],
)
def test_patterns_that_are_not_matched_are_refused_before(pattern: str, told: str) -> None:
    with pytest.raises(PatternError, match=told):
        check_pattern(pattern)


def test_repetitions_in_a_choice_by_a_group_are_not_left_to_re() -> None:
    with pytest.raises(PatternError, match="has a reference to a group"):
        check_pattern(r"(a|)(?(1)(x+x+)+y|z)")


def test_a_reference_to_a_group_beside_one_repetition_is_left_to_re() -> None:
    assert fits(r"layers\.(\d+)\.x\1$", "layers.12.x12")
    assert not fits(r"layers\.(\d+)\.x\1$", "layers.12.x21")


def test_a_pattern_of_very_many_repetitions_has_no_more_steps_than_one_of_fifty() -> None:
    many = "|".join(f"(?:abcdefgh){{0,{600 + i}}}{chr(0x4E00 + i)}" for i in range(300))
    with pytest.raises(PatternError, match="takes too many steps"):
        fits(many, "abcdefgh" * 500, "match")


def test_a_pattern_has_a_number_of_steps_over_all_names() -> None:
    check_pattern(pattern := "(x*y|)" * 400 + "z")
    with pytest.raises(PatternError, match="takes too many steps"):
        [fits(pattern, "x" * 2_000 + str(i), "match") for i in range(200)]


def adapter(folder: Path, config: dict[str, object], module: str = "a" * 80 + ".q") -> Path:
    head = f"base_model.model.{module}"
    save(
        folder / "adapter_model.safetensors",
        {f"{head}.lora_A.weight": ("F32", (2, 6)), f"{head}.lora_B.weight": ("F32", (4, 2))},
    )
    save_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config)
    return folder


@pytest.mark.parametrize(
    "config",
    [{"rank_pattern": dict.fromkeys(SLOW, 2)} for _ in "1"]
    + [{"alpha_pattern": dict.fromkeys(SLOW, 2)} for _ in "1"]
    + [{"target_parameters": ["weight"], "target_modules": f"({'|'.join(SLOW[:8])})"}]
    + [{key: "(a+)+$"} for key in ("exclude_modules", "layers_pattern", "modules_to_save")]
    + [{"layers_to_transform": [0], "layers_pattern": ["(a+)+$"]}],
    ids=lambda config: next(reversed(config)),
)
def test_an_adapter_with_slow_patterns_is_read_at_once(tmp_path: Path, config: dict[str, object]) -> None:
    folder = adapter(tmp_path / "a", config)
    code = f"from alnico.checkpoint.open_adapter import open_adapter; print(open_adapter({str(folder)!r}).updates)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_lists_of_many_modules_are_looked_up(tmp_path: Path) -> None:
    words = [f"{'m' * (i % 50)}{i}" for i in range(200_000)]
    config = {"target_modules": [*words, "q"], "modules_to_save": words}
    with open_adapter(str(adapter(tmp_path / "a", config))) as opened:
        from alnico.checkpoint.lora_adapter import is_saved_module, is_targeted

        assert [
            is_targeted(opened.config, name) for name in ("x.q", "q", "xq", "0", "m.1") for _ in range(100)
        ] == [found for found in (True, True, False, True, False) for _ in range(100)]
        assert is_saved_module(opened.config, "a.xx0.weight")
        assert not is_saved_module(opened.config, "a.xx.weight")


def test_an_adapters_pattern_that_is_refused_is_named_short_and_escaped(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_adapter(str(adapter(tmp_path / "a", {"target_modules": "\x1b[31m" + "a" * 20_000})))
    assert "target_modules has the pattern '\\x1b[31m" in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.raises(
        ModelError, match="has 300000 patterns for 2 tensors, 300000 of them regular expressions"
    ):
        open_adapter(str(adapter(tmp_path / "b", {"rank_pattern": {f"(a*)*{i}": 1 for i in range(300_000)}})))


@pytest.mark.parametrize(
    ("pattern", "name", "does"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "xq_proj", False),
        ("layers.0.q", "model.layers.0.q", True),
        ("layers.0.q", "model.layers_0.q", True),  # a point fits any character
        ("layers.0.q", "model.layers.10.q", False),
        (".q", "xq", True),
        ("q", "q\n", True),
        ("q|k", "a.k", True),
        (r".*\.1\d\.q", "layers.12.q", True),
    ],
)
def test_a_rank_pattern_means_what_peft_says(pattern: str, name: str, does: bool) -> None:
    from alnico.checkpoint.lora_adapter import _matches_end

    assert (re.match(rf"(.*\.)?({pattern})$", name) is not None) == does  # peft.utils.other.get_pattern_key
    assert _matches_end(pattern, name, "rank_pattern") == does


def test_filters_of_a_recipe_are_matched_in_bounded_time_or_refused_by_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(
            tmp_path / name / "model.safetensors",
            {"a" * 60 + ".weight": ("F32", (2,)), "a" * 61 + "!": ("F32", (2,))},
        )
    cases = [{"filter": f"re:{p}", "value": 0.5} for p in SLOW] + [{"value": 1.0}]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / n), "parameters": {"weight": cases}} for n in ("one", "two")],
    }
    code = f"import alnico; alnico.plan({recipe!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
    cases[0]["filter"] = "re:(a*)(b*)\\1"
    with pytest.raises(RecipeError, match=r"filter is .*which has a reference to a group"):
        alnico.plan(recipe)
    cases[0]["filter"] = "re:^" + "(a*y|)" * 600 + "z"
    cases[1:] = [{"value": 1.0}]
    for name in ("one", "two"):
        save(tmp_path / name / "model.safetensors", {"a" * 3_000 + str(i): ("F32", (2,)) for i in range(40)})
    with pytest.raises(RecipeError, match=r"the filter 're:\^\(a\*y\|\)\(.*\.\.\.': takes too many steps"):
        alnico.plan(recipe)
