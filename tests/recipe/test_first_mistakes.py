"""Mistakes of a first-time user with habits of mergekit and Hugging Face, each with the answer that helps."""

from __future__ import annotations

from pathlib import Path

import pytest

import alnico
from alnico.errors import AlnicoError
from alnico.recipe.load import parse_recipe
from made import family

TWO = "merge_method: linear\nmodels:\n- m/tuned-0\n- m/tuned-1\n"
TIES = "merge_method: ties\nbase_model: m/base\nmodels:\n- m/tuned-0\n- m/tuned-1\n"
SLERP = "merge_method: slerp\nbase_model: m/base\nmodels: [m/base, m/tuned-0]\n"
STACK = "merge_method: passthrough\nslices:\n- sources:\n  - model: m/tuned-0\n    layer_range: "
ENTRY = "merge_method: linear\nmodels:\n- m/tuned-0\n- model: m/tuned-1\n"

MISTAKES: dict[str, tuple[str, str]] = {
    # The shape of the file.
    "a tab": ("merge_method: linear\nmodels:\n\t- a\n", "A tab indents line 3; YAML allows only spaces there. Replace the tab with spaces."),
    "a tab after a colon": ("merge_method:\tlinear\nmodels:\n- model:\ta\n", "A tab is in line 1; YAML allows only spaces there."),
    "no colon": ("merge_method linear\nmodels:\n- a\n", "A colon is missing in line 1 ('merge_method linear')."),
    "no colon before a list": ("merge_method: linear\nmodels\n- a\n- b\n", "A colon is missing in line 2 ('models')."),
    "no space after a colon": ("merge_method:linear\nmodels:\n- a\n", "A space is missing after the colon in line 1 ('merge_method:linear')."),
    "no space in an entry": ("merge_method: linear\nmodels:\n- model:a\n- b\n", "Write a space after the colon: model: a."),
    "no space after a dash": ("merge_method: linear\nmodels:\n -a\n -b\n", "Write a space after each dash."),
    "equals signs": ("merge_method = linear\nmodels = a\n", "Write a colon and a space after each key, as in merge_method: linear."),
    "a list of keys": ("- merge_method: linear\n- models: [a]\n", "Remove the dashes before its keys."),
    "an open quote": ('merge_method: "linear\nmodels: [a, b]\n', "A quotation mark opens in line 1 and is not closed. Close it."),
    "an open bracket": ("merge_method: linear\nmodels: [a, b\ndtype: bfloat16\n", "A bracket opens in line 2 and is not closed"),
    "an indented key": ("merge_method: linear\n  models: [a]\n", "Line 2 is indented further than line 1, which has a value already."),
    "an indented option": ("merge_method: linear\nmodels:\n  - model: a\n     parameters:\n       weight: 1\n", "Line 4 is indented further than line 3"),
    "an option left of its model": ("merge_method: linear\nmodels:\n  - model: a\n  parameters:\n    weight: 1\n", "Line 4 is not indented as the lines that it belongs with."),
    "a dash before parameters": ("merge_method: linear\nmodels:\n- model: a\n- parameters: {weight: 1}\n", "If they belong to models[0], remove the dash before them."),
    "an at sign": ("merge_method: linear\nmodels:\n- @a\n", "Text in line 3 begins with @, which has a meaning in YAML. Put the text in quotes."),
    "a path of Windows in double quotes": ('merge_method: linear\nmodels: ["C:\\Users\\me", b]\n', "In double quotes a backslash begins an escape (line 2). Use single quotes, or / between"),
    "a no-break space": ("merge_method:\u00a0linear\nmodels: [a, b]\n", "Line 1 has a no-break space (U+00A0), as copying from a page leaves."),
    "typographic quotes": ("merge_method: \u201clinear\u201d\nmodels: [a, b]\n", "Did you mean linear?"),
    # Methods.
    "average": (TWO.replace("linear", "average"), "Did you mean linear?"),
    "mean": (TWO.replace("linear", "mean"), "Did you mean linear?"),
    "model soup": (TWO.replace("linear", "model_soup"), "Did you mean linear?"),
    "lerp": (TWO.replace("linear", "lerp"), "Did you mean linear?"),
    "capitals": (TIES.replace("ties", "TIES"), "Did you mean ties?"),
    "ties-merging": (TIES.replace("ties", "ties-merging"), "Did you mean ties?"),
    "drop-and-rescale": (TIES.replace("ties", "drop-and-rescale"), "Did you mean dare_ties or dare_linear?"),
    "task-arithmetic": (TIES.replace("ties", "task-arithmetic"), "Did you mean task_arithmetic?"),
    "task vectors": (TIES.replace("ties", "task vectors"), "Did you mean task_arithmetic?"),
    "frankenmerge": (TWO.replace("linear", "frankenmerge"), "Did you mean passthrough, with `slices`?"),
    "lora": (TWO.replace("linear", "lora"), "`alnico lora fold BASE ADAPTER... OUT` merges adapters into their base"),
    "method": (TWO.replace("merge_method", "method"), "1: unknown key 'method'. Did you mean merge_method?"),
    # Models.
    "base-model": (TIES.replace("base_model", "base-model"), "2: unknown key 'base-model'. Did you mean base_model?"),
    "base": (TIES.replace("base_model", "base"), "2: unknown key 'base'. Did you mean base_model?"),
    "no base": (TIES.replace("base_model: m/base\n", ""), "ties needs base_model, the model that the others were fine-tuned from. Add base_model: PATH."),
    "models with weights": ("merge_method: linear\nmodels:\n  a: 0.3\n  b: 0.7\n", "Begin each model with a dash: - {model: a, parameters: {weight: 0.3}}."),
    "models by name": ("merge_method: linear\nmodels:\n  one: {model: a}\n  two: {model: b}\n", "Begin each model with a dash: - {model: a}."),
    "one model without a list": ("merge_method: linear\nmodels: a\n", "Write them in brackets: [a]."),
    "models with commas": ("merge_method: linear\nmodels: a, b\n", "Write them in brackets: [a, b]."),
    "a list in a list": ("merge_method: linear\nmodels: [[a, b]]\n", "Remove one pair of brackets."),
    "path for model": ("merge_method: linear\nmodels:\n- path: a\n- b\n", "3: models[0] has the unknown key 'path'. Did you mean model?"),
    "name for model": ("merge_method: linear\nmodels:\n- name: a\n- b\n", "3: models[0] has the unknown key 'name'. Did you mean model?"),
    "an address": (TWO.replace("m/tuned-0", "https://huggingface.co/org/name/tree/v1"), "Write the id in place of the address: org/name@v1."),
    "a variable": (TWO.replace("m/tuned-0", "$HOME/a"), "Variables are not replaced. Write the path itself."),
    "a path of Windows": (TWO.replace("m/tuned-0", "m\\tuned-0"), "Did you mean m/tuned-0?"),
    "a misspelt path": (TWO.replace("m/tuned-0", "m/tuend-0"), "m/tuned-0 is there. Did you mean m/tuned-0?"),
    "a model as the recipe of tokens": (f"{TWO}tokenizer: union\n", "Did you mean tokenizer_source: union?"),
    "models and slices": (f"{TWO}slices: [{{sources: [{{model: a, layer_range: [0, 1]}}]}}]\n", "models and slices are both present; expected one of models, checkpoints, slices and modules."),
    "an adapter as a key": (f"{ENTRY}  adapter: ad\n", "Write it after the model's name: model: m/tuned-1+ad"),
    # Layers.
    "a range with a dash": (f"{STACK}0-2\n", "Did you mean [0, 2]?"),
    "a range with a comma": (f"{STACK}0, 2\n", "Did you mean [0, 2]?"),
    "a range in parentheses": (f"{STACK}(0, 2)\n", "Did you mean [0, 2]?"),
    "a range backwards": (f"{STACK}[2, 0]\n", "Did you mean [0, 2]?"),
    "a range beyond the model": (f"{STACK}[0, 32]\n", "Layers count from 0, and the end is excluded: write at most [0, 2]."),
    "a slice without sources": ("merge_method: passthrough\nslices:\n- model: a\n  layer_range: [0, 2]\n", "3: slices[0] has a model; expected `sources`, a list of models, each with its layer_range."),
    "sources without a list": ("merge_method: passthrough\nslices:\n- sources: a\n", "Write [{model: a, layer_range: [0, 8]}]."),
    # Options and values.
    "weights": (f"{TWO}parameters: {{weights: 0.5}}\n", "parameters.weights is not an option of linear. Did you mean weight?"),
    "a weight next to its model": (f"{ENTRY}  weight: 0.5\n", "It is an option of linear: write it under models[1].parameters."),
    "weights next to its model": (f"{ENTRY}  weights: 0.5\n", "Did you mean weight, under models[1].parameters?"),
    "an option at the top": (f"{TIES}density: 0.5\n", "It is an option of ties: write it under parameters."),
    "parameters as a list": (f"{TWO}parameters:\n- weight: 0.5\n", "Write one key per line, without dashes or brackets."),
    "density 30": (f"{TIES}parameters: {{density: 30}}\n", "Did you mean 0.3?"),
    "density 30%": (f"{TIES}parameters: {{density: 30%}}\n", "parameters.density is '30%'; expected a number. Did you mean 0.3?"),
    "t 50%": (f"{SLERP}parameters: {{t: 50%}}\n", "parameters.t is '50%'; expected a number. Did you mean 0.5?"),
    "t 0,5": (f"{SLERP}parameters:\n  t: 0,5\n", "Did you mean 0.5?"),
    "t {0,5}": (f"{SLERP}parameters: {{t: 0,5}}\n", "Write numbers with a point, as in 0.5, and lists in brackets, as in [0.5, 0.5]."),
    "a weight of 1/3": (f"{ENTRY}  parameters: {{weight: 1/3}}\n", "Did you mean 0.333333?"),
    "weights in parentheses": (f"{TWO}parameters: {{weight: (0.5, 0.5)}}\n", "and lists in brackets, as in [0.5, 0.5]."),
    "ratio": (f"{SLERP}parameters: {{ratio: 0.5}}\n", "parameters.ratio is not an option of slerp. Did you mean t?"),
    "no t": (SLERP, "slerp needs the option t: the place on the arc, any number. Set it under parameters."),
    "dtype 4bit": (f"{TWO}dtype: 4bit\n", "Merge in one of these, and quantise the output with another program; q8_0 is for an OUT.gguf."),
    "dtype q4_k_m": (f"{TWO}dtype: q4_k_m\n", "Merge in one of these, and quantise the output with another program; q8_0 is for an OUT.gguf."),
    "dtype auto": (f"{TWO}dtype: auto\n", "Leave dtype out: the output then has the dtype of the inputs."),
    "dtype 16": (f"{TWO}dtype: 16\n", "dtype is 16; expected a name. Did you mean float16?"),
    "torch_dtype": (f"{TWO}torch_dtype: bfloat16\n", "unknown key 'torch_dtype'. Did you mean dtype?"),
    "an output in the recipe": (f"{TWO}output_dir: out\n", "It belongs to the command line: alnico merge RECIPE OUT."),
    "a shard size in the recipe": (f"{TWO}max_shard_size: 2GB\n", "alnico merge RECIPE OUT --max-shard-size 5GB."),
}  # fmt: skip

ACCEPTED = {
    "a number in quotes": f"{SLERP}parameters: {{t: '0.5'}}\n",
    "fp16": f"{TWO}dtype: fp16\n",
    "torch.bfloat16": f"{TWO}dtype: torch.bfloat16\n",
    "half": f"{TWO}dtype: half\n",
    "empty parameters": f"{TWO}parameters:\n",
}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family(Path("m"), 2)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(name: str) -> None:
    text, expected = MISTAKES[name]
    Path("r.yml").write_text(text)
    with pytest.raises(AlnicoError) as caught:
        alnico.plan("r.yml", offline=True)
    told = str(caught.value)
    assert expected in told
    assert len(told.splitlines()) <= 2


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_mergekit_accepts_is_accepted(name: str) -> None:
    parse_recipe(ACCEPTED[name], "r.yml")


def test_a_list_that_looks_like_one_value_per_model_is_noted() -> None:
    note = (
        "r.yml:1: parameters.weight is a list over the layers, from the first to the last, for every model. "
        "For one value per model, write it under each model."
    )
    assert parse_recipe(f"{TWO}parameters: {{weight: [0.3, 0.7]}}\n", "r.yml").notes == (note,)
    assert parse_recipe(f"{TWO}parameters: {{weight: [0.3, 0.5, 0.7]}}\n", "r.yml").notes == ()
