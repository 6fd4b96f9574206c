"""What a wrong recipe is told: every message word for word, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alnico.errors import RecipeError
from alnico.methods.base import Merge, PerModel, combine, method
from alnico.recipe import scalars
from alnico.recipe.load import load_recipe, parse_recipe

TOP = (
    "merge_method, models, checkpoints, slices, modules, methods, base_model, preset, lines, protect, parameters, tokenizer_source, tokenizer, "
    "chat_template, dtype, out_dtype, missing, unrelated, base_mismatch, complete_from, routers, requantise, seed, name"
)
TAIL = "\nmodels: [a, b]"


def message(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yml")
    assert caught.value.exit_code == 3
    return str(caught.value)


def under_ties(line: str) -> str:
    """A recipe of ties whose parameters, in line 4, are ``line``."""
    return f"merge_method: ties\nbase_model: a\nparameters:\n  {line}\nmodels: [a, b, c]\n"


KEYS = {
    "search": (
        "merge_method: ties\nmodels: [a]\nsearch: {trials: 5}",
        "3: search belongs to a search; expected a recipe without it. Run `alnico search` and merge the recipe it writes.",
    ),
    "merge_method is a choice": (
        "merge_method: {choice: [ties]}" + TAIL,
        "1: merge_method is a choice to search; expected a method. Run `alnico search`, or name a method.",
    ),
    "merge_method missing": (
        "models: [a]",
        "1: merge_method is missing. `alnico methods` lists all methods.",
    ),
    "merge_method unknown": (
        "merge_method: tise" + TAIL,
        "1: unknown merge method 'tise'; expected one of those that `alnico methods` lists. Did you mean ties?",
    ),
    "merge_method a number": (
        "merge_method: 3" + TAIL,
        "1: merge_method is 3; expected text. Put it in quotes.",
    ),
    "merge_method a list": ("merge_method: [ties]" + TAIL, "1: merge_method is a list; expected text."),
    "merge_method empty": ("merge_method:" + TAIL, "1: merge_method is empty; expected text."),
    "models missing": ("merge_method: linear", "1: models is missing; expected a list of models."),
    "models text": (
        "merge_method: linear\nmodels: a",
        "2: models is 'a'; expected a list of 1 to 1000 models. Write them in brackets: [a].",
    ),
    "models empty": (
        "merge_method: linear\nmodels: []",
        "2: models is a list of 0; expected a list of 1 to 1000 models.",
    ),
    "models too many": (
        f"merge_method: linear\nmodels: [{'a, ' * 1001}]",
        "2: models is a list of 1001; expected a list of 1 to 1000 models.",
    ),
    "model a number": (
        "merge_method: linear\nmodels:\n  - 3",
        "3: models[0] is 3; expected a mapping with `model` and optionally `parameters`.",
    ),
    "model without a path": (
        "merge_method: linear\nmodels:\n  - parameters: {weight: 1}",
        "3: models[0].model is missing; expected the path of a model.",
    ),
    "base empty where it is needed": (
        "merge_method: ties\nbase_model:" + TAIL,
        "1: ties needs base_model, the model that the others were fine-tuned from. Add base_model: PATH.",
    ),
    "base a number": (
        "merge_method: linear\nbase_model: 12" + TAIL,
        "2: base_model is 12; expected text. Put it in quotes.",
    ),
    "base two lines": (
        'merge_method: linear\nbase_model: "a\\nb"' + TAIL,
        "2: base_model is 'a\\nb'; expected text of one line, of at most 4096 characters.",
    ),
    "base blank": (
        "merge_method: linear\nbase_model: ' '" + TAIL,
        "2: base_model is ' '; expected text of one line, of at most 4096 characters.",
    ),
    "base too long": (
        f"merge_method: linear\nbase_model: {'a' * 5000}" + TAIL,
        "2: base_model is too long; expected text of one line, of at most 4096 characters.",
    ),
    "model key unknown": (
        "merge_method: linear\nmodels:\n  - model: a\n    paramters: {}",
        "4: models[0] has the unknown key 'paramters'. Did you mean parameters?",
    ),
    "model key without a neighbour": (
        "merge_method: linear\nmodels:\n  - model: a\n    xyz: [0, 3]",
        "4: models[0] has the unknown key 'xyz'. Valid names: model, parameters, layer_range.",
    ),
    "option beside model": (
        "merge_method: linear\nmodels:\n  - model: a\n    weight: 1",
        "4: models[0] has the unknown key 'weight'. It is an option of linear: write it under models[0].parameters.",
    ),
    "option at the top": (
        "merge_method: ties\nbase_model: a\nlambda: 2" + TAIL,
        "3: unknown key 'lambda'. It is an option of ties: write it under parameters.",
    ),
    "key misspelt": (
        "merge_method: linear\nbase_modle: a" + TAIL,
        "2: unknown key 'base_modle'. Did you mean base_model?",
    ),
    "key without a neighbour": (
        "merge_method: linear\nxyz: a" + TAIL,
        f"2: unknown key 'xyz'. Valid names: {TOP}.",
    ),
    "key very long": (
        f"merge_method: linear\n{'k' * 100}: a" + TAIL,
        f"2: unknown key '{'k' * 57}...'. Valid names: {TOP}.",
    ),
    "dtype unknown": (
        "merge_method: linear\ndtype: bfloat61" + TAIL,
        "2: dtype is 'bfloat61'; expected bfloat16, float16, float32 or float64. Did you mean bfloat16?",
    ),
    "dtype integer": (
        "merge_method: linear\ndtype: int8" + TAIL,
        "2: dtype is 'int8'; expected bfloat16, float16, float32 or float64. "
        "Merge in one of these, and quantise the output with another program; q8_0 is for an OUT.gguf.",
    ),
    "dtype a number": (
        "merge_method: linear\ndtype: 16" + TAIL,
        "2: dtype is 16; expected a name. Did you mean float16?",
    ),
    "dtype beside out_dtype": (
        "merge_method: linear\nout_dtype: bfloat16\ndtype: fantasy" + TAIL,
        "3: dtype is 'fantasy'; expected bfloat16, float16, float32 or float64.",
    ),
    "out_dtype unknown": (
        "merge_method: linear\nout_dtype: int8" + TAIL,
        "2: out_dtype is 'int8'; expected bfloat16, float16, float32 or float64. "
        "Merge in one of these, and quantise the output with another program; q8_0 is for an OUT.gguf.",
    ),
    "seed text": (
        "merge_method: linear\nseed: lucky" + TAIL,
        "2: seed is 'lucky'; expected a whole number of at most 64 bits.",
    ),
    "seed a fraction": (
        "merge_method: linear\nseed: 1.5" + TAIL,
        "2: seed is 1.5; expected a whole number of at most 64 bits.",
    ),
    "seed a truth": (
        "merge_method: linear\nseed: yes" + TAIL,
        "2: seed is true; expected a whole number of at most 64 bits.",
    ),
    "seed too large": (
        f"merge_method: linear\nseed: {1 << 63}" + TAIL,
        "2: seed is 9223372036854775808; expected a whole number of at most 64 bits.",
    ),
    "seed huge": (
        f"merge_method: linear\nseed: {10**70}" + TAIL,
        "2: seed is a number of more than 60 digits; expected a whole number of at most 64 bits.",
    ),
    "missing unknown": (
        "merge_method: linear\nmissing: ignore" + TAIL,
        "2: missing is 'ignore'; expected error, copy or drop.",
    ),
    "unrelated unknown": (
        "merge_method: linear\nunrelated: true" + TAIL,
        "2: unrelated is true; expected error or allow.",
    ),
    "missing a list": (
        "merge_method: linear\nmissing: [copy]" + TAIL,
        "2: missing is a list; expected error, copy or drop.",
    ),
    "base needed": (
        "models: [a, b]\nmerge_method: ties",
        "2: ties needs base_model, the model that the others were fine-tuned from. Add base_model: PATH.",
    ),
    "base of an arc needed": (
        "merge_method: slerp\nparameters: {t: 0.5}" + TAIL,
        "1: slerp needs base_model, the model to start from, one of its two. Add base_model: PATH.",
    ),
    "option needed": (
        "merge_method: slerp\nbase_model: a" + TAIL,
        "1: slerp needs the option t: the place on the arc, any number. Set it under parameters.",
    ),
    "too many for slerp": (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels: [a, b, c]",
        "4: slerp merges 2 models, base_model one of them; found 3. Remove models.",
    ),
    "too few for slerp": (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels: [a]",
        "4: slerp merges 2 models, base_model one of them; found 1. Add models.",
    ),
    "base of slerp twice": (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels: [a, a, b]",
        "4: base_model is listed more than once under models; expected once. Remove the repetitions.",
    ),
    "a mixture of mergekit-moe": (
        "merge_method: linear\nmodels: [a, b]\nbase_model: a\ngate_mode: hidden\nexperts: [{source_model: a}]",
        "1: merge_method and experts are both given; expected a merge, or a mixture. Make what the mixture is built from by a document of "
        "its own, and name that as source_model.",
    ),
    "too many for passthrough": (
        "merge_method: passthrough" + TAIL,
        "2: passthrough merges 1 model; found 2. Remove models, or put their layers together by slices in a recipe.",
    ),
    "only the base": (
        "merge_method: ties\nbase_model: a\nmodels: [a]",
        "3: ties merges at least 1 model besides base_model; found 0. Add models.",
    ),
    "shared option differs": (
        "merge_method: slerp\nbase_model: a\nmodels:\n- model: a\n  parameters: {t: 0.3}\n- model: b\n  parameters: {t: 0.5}",
        "3: t must have one value for the whole merge, but it differs (models[0]: 0.3, models[1]: 0.5). Set it once, under parameters.",
    ),
    "shared option differs from the global one": (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.3}\nmodels:\n- a\n- model: b\n  parameters: {t: 0.5}",
        "4: t must have one value for the whole merge, but it differs (models[1]: 0.5, parameters: 0.3). Set it once, under parameters.",
    ),
    "a part of a step": (
        "merge_method: karcher\nparameters: {max_iter: 2.5}" + TAIL,
        "2: parameters.max_iter is 2.5; expected a whole number in [0, 100000].",
    ),
    "della without room for its window": (
        "merge_method: della\nbase_model: x\nparameters: {density: 0.9, epsilon: 0.2}" + TAIL,
        "4: density 0.9 and epsilon 0.2 give probabilities from 0.7 to 1.1; expected them between 0 and 1. Choose a smaller epsilon.",
    ),
    "nuslerp of three": (
        "merge_method: nuslerp\nmodels: [a, b, c]",
        "2: nuslerp merges 2 models besides base_model; found 3. Remove models.",
    ),
    "weights of linear sum to 0": (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: -1}}",
        "2: the weights of linear sum to 0 (1, -1), so they cannot be normalised; expected a sum other than 0. "
        "Change a weight, or set normalize: false.",
    ),
    "weights of task_arithmetic sum to 0": (
        "merge_method: task_arithmetic\nbase_model: a\nparameters: {normalize: true, weight: 0}" + TAIL,
        "4: the weights sum to 0 (0), so they cannot be normalised; expected a sum other than 0. "
        "Change a weight, or set normalize: false.",
    ),
    "parameters a number": (
        "merge_method: linear\nparameters: 3" + TAIL,
        "2: parameters is 3; expected a mapping of option names to values.",
    ),
    "parameters a list": (
        "merge_method: linear\nmodels:\n- model: a\n  parameters: [weight]",
        "4: models[0].parameters is a list; expected a mapping of option names to values. "
        "Write one key per line, without dashes or brackets.",
    ),
}

VALUES = {
    "density: 1.4": (
        "parameters.density is 1.4; density is the share of each tensor's entries that is kept, in (0, 1]. Did you mean 0.14?"
    ),
    "density: 90": (
        "parameters.density is 90; density is the share of each tensor's entries that is kept, in (0, 1]. Did you mean 0.9?"
    ),
    "density: 0": "parameters.density is 0; density is the share of each tensor's entries that is kept, in (0, 1].",
    "density: -0.5": "parameters.density is -0.5; density is the share of each tensor's entries that is kept, in (0, 1].",
    "density: .nan": "parameters.density is nan; expected a finite number.",
    "weight: .inf": "parameters.weight is inf; expected a finite number.",
    "weight: -.INF": "parameters.weight is -inf; expected a finite number.",
    "weight: 'nan'": "parameters.weight is 'nan'; expected a finite number.",
    "weight: 1e999": "parameters.weight is '1e999'; expected a finite number.",
    f"weight: {10**400}": "parameters.weight is a number of more than 60 digits; expected a finite number.",
    "weight: true": "parameters.weight is true; expected a number.",
    "weight: heavy": "parameters.weight is 'heavy'; expected a number.",
    "weight:": "parameters.weight is empty; expected a number.",
    f"weight: {'x' * 100}": f"parameters.weight is '{'x' * 57}...'; expected a number.",
    "elect: majority": "parameters.elect is 'majority'; expected one of weighted, mass, count.",
    "elect: true": "parameters.elect is true; expected one of weighted, mass, count.",
    "elect: 1": "parameters.elect is 1; expected one of weighted, mass, count.",
    "normalize: 3": "parameters.normalize is 3; expected true or false.",
    "normalize: weight": "parameters.normalize is 'weight'; expected true or false.",
    "rescale: 2": "parameters.rescale is 2; expected one of l1, inverse, none.",
    "lambda: big": "parameters.lambda is 'big'; expected a number.",
    "densty: 0.5": "parameters.densty is not an option of ties. Did you mean density?",
    "cutoff: 0.5": (
        "parameters.cutoff is not an option of ties. Valid names: density, weight, scale, elect, tie, divide, rescale, scope, lambda, normalize."
    ),
    "density: []": "parameters.density is a list of 0; expected at least one value.",
    "weight: {from: fisher}": "parameters.weight.from is 'fisher'; expected one of l2_norm, analysis, given, schedule.",
    "weight: {from: l2norm}": "parameters.weight.from is 'l2norm'; expected one of l2_norm, analysis, given, schedule. Did you mean l2_norm?",
    "weight: {from: l2_norm, mode: exponential}": "parameters.weight.mode is 'exponential'; expected one of linear, power, exp.",
    "weight: {from: l2_norm, per: layers}": (
        "parameters.weight.per is 'layers'; expected one of model, layer, tensor. Did you mean layer?"
    ),
    "weight: {from: l2_norm, beta: -1}": "parameters.weight.beta is -1; expected a number of at least 0.",
    "weight: {from: l2_norm, mode: power, alpha: 0}": "parameters.weight.alpha is 0; expected a number above 0.",
    "weight: {from: l2_norm, scale: .inf}": "parameters.weight.scale is inf; expected a finite number.",
    "weight: {from: l2_norm, alfa: 2}": "parameters.weight has the unknown key 'alfa'. Did you mean alpha?",
    "weight: {from: analysis}": (
        "parameters.weight.path is missing; expected the folder that `alnico analyze` wrote. Add path: FOLDER."
    ),
    "density: {from: l2_norm}": (
        "parameters.density is a mapping with `from`; only weight is computed from norms. Write a value."
    ),
    "weight: {search: [0, 1]}": (
        "parameters.weight is a value to search; expected its value. Run `alnico search`, or write a value."
    ),
    "weight: {choice: [0, 1]}": (
        "parameters.weight is a choice to search; expected its value. Run `alnico search`, or write a value."
    ),
    "weight: {by: layer}": (
        "parameters.weight is an unknown kind of mapping; expected a value, a list of values, or filter and value."
    ),
    "{lambda: 2, scale: 3}": (
        "parameters: lambda and scale are the same option and disagree (lambda means scale: 2, scale is 3). Remove one."
    ),
    "{divide: count, normalize: true}": (
        "parameters: divide and normalize are the same option and disagree (divide is 'count', normalize means divide: 'weight'). "
        "Remove one."
    ),
}

TEXTS = {
    "empty": ("", "1: is empty; expected at least merge_method and models."),
    "only comments": ("# nothing\n---\n", "1: is empty; expected at least merge_method and models."),
    "a list": ("- a\n- b", "1: is a list; expected a mapping with at least merge_method and models."),
    "a word": (
        "linear",
        "1: is 'linear'; expected a mapping with at least merge_method and models. Write a colon and a space after each key, as in merge_method: linear.",
    ),
    "two documents": (
        "merge_method: linear\nmodels: [a]\n---\nmerge_method: ties\n",
        "4: a second document begins; expected one recipe. Pass the file to `alnico merge` or alnico.merge_documents.",
    ),
    "a bracket left open": (
        "merge_method: linear\nmodels: [a\nseed: 1\n",
        "3: is not YAML (while parsing a flow sequence, expected ',' or ']', but got ':'). "
        "A bracket opens in line 2 and is not closed, or a comma is missing. Check the brackets.",
    ),
    "a tabulator": (
        "merge_method: linear\n\tmodels: [a]\n",
        "2: is not YAML (while scanning for the next token, found character '\\t' that cannot start any token). "
        "A tab indents line 2; YAML allows only spaces there. Replace the tab with spaces.",
    ),
    "an unknown anchor": (
        "merge_method: linear\nmodels: *all\n",
        "2: is not YAML (found undefined alias 'all'). Correct this line or the one before it.",
    ),
    "a control character": (
        "merge_method: linear\nmodels: [a\x07]\n",
        "2: is not YAML (it has the character U+0007). Remove the character.",
    ),
    "a date": (
        "merge_method: linear\nseed: 2024-01-31\nmodels: [a]\n",
        "2: '2024-01-31' is YAML of the type !!timestamp, which a recipe cannot hold; expected a number, text, true or false. "
        "Put text in quotes, and remove the type.",
    ),
    "a date that is none": (
        "merge_method: linear\nseed: !!timestamp soon\nmodels: [a]\n",
        "2: 'soon' is YAML of the type !!timestamp, which a recipe cannot hold; expected a number, text, true or false. "
        "Put text in quotes, and remove the type.",
    ),
    "a truth that is none": (
        "merge_method: linear\nseed: !!bool maybe\nmodels: [a]\n",
        "2: 'maybe' is YAML of the type !!bool, which a recipe cannot hold; expected a number, text, true or false. "
        "Put text in quotes, and remove the type.",
    ),
    "a set": (
        "merge_method: linear\nmodels: !!set {a, b}\n",
        "2: a value is YAML of the type !!set, which a recipe cannot hold; expected a number, text, true or false. "
        "Put text in quotes, and remove the type.",
    ),
    "a key that is a list": (
        "merge_method: linear\n? [a, b]\n: 3\nmodels: [a]\n",
        "2: a key is a list or a mapping; expected a name.",
    ),
    "a merge key of a number": (
        "merge_method: linear\n<<: 3\nmodels: [a]\n",
        "2: << is 3; expected a mapping. Use an alias such as *common.",
    ),
    "a key given twice": (
        "merge_method: linear\nmodels: [a]\nseed: 1\nseed: 2\n",
        "4: seed appears twice, first in line 3. Remove one.",
    ),
    "an option given twice": (
        "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: 1\n    weight: 2\n",
        "6: weight appears twice, first in line 5. Remove one.",
    ),
}


@pytest.mark.parametrize(("text", "expected"), KEYS.values(), ids=KEYS.keys())
def test_a_wrong_key_has_one_message_with_its_line(text: str, expected: str) -> None:
    assert message(text) == f"recipe.yml:{expected}"


@pytest.mark.parametrize(("line", "expected"), VALUES.items(), ids=[k[:30] for k in VALUES])
def test_a_wrong_option_has_one_message_with_its_line(line: str, expected: str) -> None:
    assert message(under_ties(line)) == f"recipe.yml:4: {expected}"


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS.keys())
def test_text_that_is_no_recipe_has_one_message_with_its_line(text: str, expected: str) -> None:
    assert message(text) == f"recipe.yml:{expected}"


def test_an_option_under_a_model_is_named_with_its_model() -> None:
    text = "merge_method: ties\nbase_model: a\nmodels:\n- model: b\n- model: c\n  parameters:\n    density: 1.4\n"
    assert message(text) == (
        "recipe.yml:7: models[1].parameters.density is 1.4; density is the share of each tensor's entries that is kept, in (0, 1]. "
        "Did you mean 0.14?"
    )


def test_all_mistakes_of_a_file_come_together_in_the_order_of_its_lines() -> None:
    text = """\
base_modle: a
seed: x
models:
  - model: b
    parameters:
      density: 2
  - parameters: {}
merge_method: ties
dtype: int8
parameters:
  wieght: 1
slices: [{sources: [{model: a, layer_range: [0, 1]}]}]
"""
    told = [line.split(":")[1] for line in message(text).splitlines()]
    assert told == ["1", "2", "6", "7", "9", "11", "12"]


def test_mistakes_inside_unknown_methods_do_not_hide_others() -> None:
    lines = message("merge_method: tise\nseed: x\nparameters: {nonsense: 1}\nmodels: [a]").splitlines()
    assert [line.split(":")[1] for line in lines] == ["1", "2"]


def test_a_required_option_that_is_given_wrongly_is_not_called_absent() -> None:
    text = "merge_method: slerp\nbase_model: a\nparameters: {t: x}" + TAIL
    assert message(text) == "recipe.yml:3: parameters.t is 'x'; expected a number."


def test_a_required_option_of_each_model_is_asked_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    @method(space="delta", source="a test")
    def demanding(*, weight: PerModel[float]) -> Merge:
        """Want a weight.

        Options:
            weight: a model's coefficient, any number.
        """
        return combine(tuple(weight))

    monkeypatch.setattr(scalars, "find", {"demanding": demanding}.__getitem__)
    start = "merge_method: demanding\nbase_model: a\n"
    assert message(start + "models: [a, b]") == (
        "recipe.yml:1: demanding needs the option weight: a model's coefficient, any number. "
        "Set it under parameters, or under each model."
    )
    assert message(start + "models:\n- a\n- {model: b, parameters: {weight: 1}}\n- c") == (
        "recipe.yml:6: models[2] lacks weight: a model's coefficient, any number. Set it there, or for all models under parameters."
    )
    assert parse_recipe(start + "parameters: {weight: 1}\nmodels: [a, b]", "r").parameters == {"weight": 1}
    parse_recipe(start + "models:\n- a\n- {model: b, parameters: {weight: 1}}", "r")


def test_a_mapping_has_no_lines_in_its_messages() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            {
                "merge_method": "ties",
                "base_model": "a",
                "models": ["b"],
                "parameters": {"density": 3, "int8": 1},
            }
        )
    assert str(caught.value).splitlines() == [
        "recipe: parameters.density is 3; density is the share of each tensor's entries that is kept, in (0, 1]. Did you mean 0.3?",
        "recipe: parameters.int8 is not an option of ties. Did you mean int8_mask?",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {1, 2},
            "recipe: weight holds a value of type set; expected numbers, text, true or false, lists and mappings.",
        ),
        (
            object(),
            "recipe: weight holds a value of type object; expected numbers, text, true or false, lists and mappings.",
        ),
    ],
)
def test_a_mapping_that_holds_other_things_is_refused(value: Any, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"merge_method": "linear", "models": ["a"], "parameters": {"weight": value}})
    assert str(caught.value) == expected


def test_a_mapping_inside_itself_is_refused() -> None:
    endless: dict[str, Any] = {"merge_method": "linear", "models": ["a"]}
    endless["parameters"] = endless
    with pytest.raises(RecipeError) as caught:
        load_recipe(endless)
    assert (
        str(caught.value)
        == "recipe: is nested deeper than 32 or has more than 50000 values; expected a recipe."
    )


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda _: None, "cannot be read (No such file or directory). Check the path of the recipe."),
        (
            lambda p: p.mkdir(),
            "is a folder; expected a recipe, which is a YAML file. Give the path of the file.",
        ),
        (
            lambda p: p.write_bytes(b"\xff\xfe\x00"),
            "is text in UTF-16; expected a recipe. Save it as UTF-8; PowerShell's > writes UTF-16.",
        ),
        (
            lambda p: p.write_bytes(b"\xf0\xfe\x00"),
            "is not UTF-8 text; expected YAML. Give the YAML file of the merge.",
        ),
        (
            lambda p: p.write_bytes(b"#" * 1_000_001),
            "is larger than 1000000 bytes; expected a recipe. Give the YAML file of the merge.",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, made: Any, expected: str) -> None:
    path = tmp_path / "recipe.yml"
    made(path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: {expected}"


def test_a_path_that_no_system_takes_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("a\0b")
    assert str(caught.value) == "'a\\x00b': is not a path. Check the path of the recipe."


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1, 1.5, True, "1"])
def test_a_seed_from_outside_is_checked_too(seed: Any) -> None:
    with pytest.raises(RecipeError, match=r"^seed is .*; expected a whole number of at most 64 bits\.$"):
        load_recipe({"merge_method": "linear", "models": ["a"]}, seed=seed)


def test_a_list_of_models_in_place_of_a_recipe_names_what_makes_one() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["a", "b"])  # type: ignore[arg-type]
    assert str(caught.value) == (
        "recipe is of type list; expected a path, a mapping or a Recipe. "
        "alnico.make_recipe(models, method) makes one of models."
    )
