"""Merges without a recipe file: models and options on the command line, or in a call, make an ordinary recipe."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import alnico
from alnico.errors import RecipeError
from made import family, read_model, save_model

Run = Callable[..., tuple[int, str, str]]
ONE, TWO = np.float32([[1, 2], [3, 4]]), np.float32([[3, 6], [5, 0]])


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", ONE), ("b", TWO), ("base", ONE - 1)):
        save_model(Path("models", name), {"w": ("F32", value)}, {"architectures": ["XModel"]})
    Path("r.yml").write_text("merge_method: linear\nmodels: [models/a, models/b]\n")


def recipe_in(folder: str) -> object:
    return yaml.safe_load(Path(folder, "mergekit_config.yml").read_text())


def test_models_and_an_output_are_averaged(run: Run) -> None:
    code, stdout, stderr = run("merge", "models/a", "models/b", "out")
    assert (code, stderr) == (0, "")
    assert stdout.startswith("out: 1 tensors, 4 parameters, ")
    np.testing.assert_array_equal(read_model(Path("out"))["w"], (ONE + TWO) / 2)
    assert recipe_in("out") == {
        "merge_method": "linear",
        "models": [{"model": "models/a"}, {"model": "models/b"}],
    }


@pytest.mark.parametrize("words", [("-o", "out"), ("--out", "out")])
def test_the_output_may_be_an_option(run: Run, words: tuple[str, ...]) -> None:
    assert run("merge", *words, "models/a", "models/b", "--weights", "3,1")[0] == 0
    np.testing.assert_array_equal(read_model(Path("out"))["w"], (3 * ONE + TWO) / 4)


def test_a_slash_after_a_folder_changes_nothing(run: Run) -> None:
    slashes = run(
        "merge",
        "models/a/",
        "models/b/",
        "--base",
        "models/a",
        "--method",
        "slerp",
        "-t",
        "0.5",
        "--print-recipe",
    )
    plain = run(
        "merge",
        "models/a",
        "models/b",
        "--base",
        "models/a",
        "--method",
        "slerp",
        "-t",
        "0.5",
        "--print-recipe",
    )
    assert slashes == plain


def test_options_go_into_the_recipe_that_the_output_carries(run: Run) -> None:
    options = (
        "--base",
        "models/base",
        "--density",
        "0.5,1",
        "--set",
        "lambda=0.5",
        "--set",
        "elect=mass",
        "--weights",
        "1,0.5",
    )
    code, _, stderr = run(
        "merge", "models/a", "models/b", "out", "--method", "ties", *options, "--dtype", "float16", "--seed", "7"
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    assert recipe_in("out") == {
        "merge_method": "ties",
        "base_model": "models/base",
        "models": [
            {"model": "models/a", "parameters": {"weight": 1.0, "density": 0.5}},
            {"model": "models/b", "parameters": {"weight": 0.5, "density": 1.0}},
        ],
        "parameters": {"lambda": 0.5, "elect": "mass"},
        "dtype": "float16",
        "seed": 7,
    }
    assert run("verify", "out")[0] == run("reproduce", "out")[0] == 0
    assert run("merge", "out/mergekit_config.yml", "again")[0] == 0
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_the_recipe_can_be_printed_to_go_on_from_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("models/a", "models/b", "--method", "slerp", "-t", "0.25")
    code, text, _ = run("merge", *words, "--print-recipe")
    assert code == 0
    assert (
        run("merge", *words, "out", "--print-recipe")[1] == run("plan", *words, "--print-recipe")[1] == text
    )
    assert not Path("out").exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run("merge", "-", "by-recipe")[0] == 0
    assert run("merge", *words, "by-options")[0] == 0
    assert recipe_in("by-options") == recipe_in("by-recipe") == yaml.safe_load(text)


def test_plans_and_dry_runs_take_the_same_words(run: Run) -> None:
    words = ("models/a", "models/b", "--weights", "2,1")
    planned = json.loads(run("plan", *words, "--json")[1])
    assert planned == json.loads(run("merge", *words, "out", "--dry-run", "--json")[1])
    assert planned == json.loads(run("merge", *words, "--dry-run", "--json")[1])
    assert planned["models"] == ["models/a", "models/b"]
    assert not Path("out").exists()


def test_a_method_between_two_models_starts_from_the_first(run: Run) -> None:
    _, text, stderr = run(
        "merge", "models/a", "models/b", "out", "--method", "slerp", "-t", "0.5", "--dry-run"
    )
    assert "model     models/a (base; gives config and tokenizer)" in text
    assert "note      models/a is the base, as it is the first model; --base names another." in text
    assert stderr == ""
    assert (
        "models/b (base;"
        in run("plan", "models/a", "models/b", "--method", "slerp", "-t", "0.5", "--base", "models/b")[1]
    )


def test_a_gradient_is_spread_over_the_layers(run: Run) -> None:
    base, (one, *_) = family(Path("layers"), 1)
    text = run("merge", str(base), str(one), "--method", "slerp", "-t", "0,0.5,1", "--print-recipe")[1]
    assert yaml.safe_load(text)["parameters"] == {"t": [0.0, 0.5, 1.0]}


def test_a_base_among_the_models_of_task_vectors_counts_as_the_base(run: Run) -> None:
    words = (
        "models/base",
        "models/a",
        "models/b",
        "--base",
        "models/base",
        "--method",
        "task_arithmetic",
        "--weights",
        "1,2",
    )
    text = run("merge", *words, "--print-recipe")[1]
    assert [m["model"] for m in yaml.safe_load(text)["models"]] == ["models/a", "models/b"]


def test_one_model_with_options_is_merged(run: Run) -> None:
    assert run("merge", "models/a", "half", "--dtype", "float16")[0] == 0
    assert read_model(Path("half"))["w"].dtype == np.float16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "slrp"), "--method: unknown merge method 'slrp'; expected one of those that `alnico methods` lists. Did you mean slerp?"),
        (("--method", "ties"), "ties needs --base, the model that the others were fine-tuned from. Give --base MODEL."),
        (("--method", "slerp"), "slerp needs -t: the place on the arc, any number. Give -t NUMBER."),
        (("--method", "fisher"), "fisher needs --set fisher: the directory that ``alnico statistics fisher`` wrote for the model. Give --set fisher=VALUE."),
        (("--density", "0.5"), "--density has no effect on linear; expected options of linear: weights, normalize. Leave it out."),
        (("--weights", "1,2,3"), "--weights has 3 values for 2 models; expected one for each."),
        (("--weights", "1,nan"), "--weights of models/b is nan; expected a finite number."),
        (("--dtype", "bf15"), "--dtype is 'bf15'; expected bfloat16, float16, float32 or float64. Did you mean bf16?"),
        (("--missing", "keep"), "--missing is 'keep'; expected error, copy or drop."),
        (("--set", "normalise=false"), "--set normalise is not an option of linear. Did you mean normalize?"),
        (("--method", "ties", "--base", "models/base", "--density", "0.5,1.4"), "--density of models/b is 1.4; density is the share of each tensor's entries that is kept, in (0, 1]. Did you mean 0.14?"),
        (("models/base", "--method", "slerp", "-t", "0.5"), "slerp merges 2 models; found 3. Give two."),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_the_words_of_the_options(
    run: Run, words: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = run("merge", "models/a", "models/b", *words, "-o", "out")
    assert (code, stdout, stderr) == (3, "", f"alnico: {message}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("merge", "models/a"), "the output is missing. Write it after models/a, or give it with -o OUT."),
        (("merge", "models/a", "models/b"), "models/b is a model, but the last word is the output. Write the output after it, or name it with -o OUT; --overwrite would replace models/b."),
        (("merge", "models/a", "r.yml"), "r.yml is a recipe, but the last word is the output. Write the recipe first, then the output."),
        (("merge", "out", "r.yml"), "r.yml is a recipe, but the last word is the output. Write the recipe first, then the output."),
        (("merge", "models/a", "models/b", "out", "--weights", "0.3", "0.7"), "0.7 is a number; expected a model or the output. Separate the numbers of an option by commas: --weights 0.7,0.3."),
        (("merge", "models/a", "models/b", "--density", "0.3", ".7", "out"), ".7 is a number; expected a model or the output. Separate the numbers of an option by commas: --density 0.7,0.3."),
        (("plan", "models/a", "models/b", "out"), "out is not a model, and `alnico plan` takes no output after models. Leave it out, or write -o out."),
        (("merge", "org/a", "org/b", "org/c"), "org/c may be a model of the hub or the output. Name the output with -o OUT; ./org/c is a folder here."),
        (("merge", "models/a", "r.yml", "out"), "r.yml is a recipe, and models/a is given, too; expected one recipe, or models alone. Leave one of them out, or name the output with -o OUT."),
        (("merge", "r.yml", "r.yml", "out"), "r.yml is a recipe, and r.yml is given, too; expected one recipe, or models alone. Leave one of them out, or name the output with -o OUT."),
        (("merge", "r.yml", "out", "--ray", "head"), "r.yml is a recipe, and out is given, too; expected one recipe, or models alone. Leave one of them out, or name the output with -o OUT. --ray takes an address only as HOST:PORT or auto; 'head' is none."),
        (("merge", "r.yml", "out", "--method", "ties"), "--method is an option of a merge of models, and r.yml is a recipe. Write the setting into the recipe, or give models in its place."),
        (("plan", "r.yml", "--print-recipe"), "--print-recipe prints the recipe of models and options, and r.yml is a recipe already. Leave the option out."),
        (("plan", "models/a", "models/b", "--set", "x"), "--set: 'x' is not NAME=VALUE. Write it as lambda=0.5."),
        (("plan", "models/a", "models/b", "--set", "normalize=true", "--set", "normalize=false"), "--set: normalize is given twice. Separate the values of several models by commas."),
        (("plan", "models/a", "models/b", "--set", "normalize=[1"), "--set: '[1', the value of normalize, is not YAML. Write a number, a word, or values separated by commas."),
    ],
)  # fmt: skip
def test_words_that_may_mean_two_things_are_refused(run: Run, words: tuple[str, ...], message: str) -> None:
    code, stdout, stderr = run(*words)
    assert (code, stdout) == (2, "")
    assert f"Error: Invalid value: {message}\n" in stderr


def test_a_finished_merge_as_the_last_word_is_not_taken_for_a_model(run: Run) -> None:
    assert run("merge", "models/a", "models/b", "out")[0] == 0
    code, _, stderr = run("merge", "models/a", "models/b", "out")
    assert code == 2
    assert (
        "out is a finished merge, but the last word is the output. "
        "Name another output, or add --overwrite to replace out." in stderr
    )


def test_a_plan_takes_the_output_of_a_recipe_as_a_merge_does(run: Run) -> None:
    for out in (("runs/out",), ("-o", "runs/out"), ("--out", "runs/out")):
        code, stdout, stderr = run("plan", "r.yml", *out)
        assert (code, stderr) == (0, "")
        assert "method    linear" in stdout
    assert not Path("runs").exists()
    code, _, stderr = run("plan", "models/a", "models/bas")
    assert code == 4
    assert "Did you mean models/base?" in stderr


def test_overwrite_says_that_a_model_is_the_output(run: Run) -> None:
    assert run("merge", "models/a", "models/b", "out")[0] == 0
    assert run("merge", "models/a", "models/b", "out", "--weights", "1,3", "--overwrite")[0] == 0
    np.testing.assert_array_equal(read_model(Path("out"))["w"], (ONE + 3 * TWO) / 4)


def test_advice_on_keys_of_a_recipe_names_the_options(run: Run) -> None:
    save_model(Path("more"), {"w": ("F32", ONE), "v": ("F32", TWO)}, {"architectures": ["XModel"]})
    code, _, stderr = run("merge", "models/a", "more", "out")
    assert code == 5
    assert "or set --missing copy or --missing drop." in stderr
    assert run("merge", "models/a", "more", "out", "--missing", "copy")[0] == 0
    assert set(read_model(Path("out"))) == {"w", "v"}


def test_a_call_makes_the_same_recipe() -> None:
    recipe = alnico.make_recipe(
        [Path("models/a"), "models/b"], "ties", base="models/base", weights=[1, 0.5], density=0.5, scale=2.0
    )
    assert yaml.safe_load(recipe.text) == {
        "merge_method": "ties",
        "base_model": "models/base",
        "models": [
            {"model": "models/a", "parameters": {"weight": 1}},
            {"model": "models/b", "parameters": {"weight": 0.5}},
        ],
        "parameters": {"density": 0.5, "scale": 2.0},
    }  # fmt: skip
    alnico.merge(recipe, "out")
    assert recipe_in("out") == yaml.safe_load(recipe.text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "ties"},
            "ties needs base, the model that the others were fine-tuned from. Pass base.",
        ),
        ({"method": "slerp"}, "slerp needs t: the place on the arc, any number. Pass t."),
        ({"weights": [1, "x"]}, "weights of models/b is 'x'; expected a number."),
        ({"normalise": False}, "normalise is not an option of linear. Did you mean normalize?"),
    ],
)
def test_mistakes_of_a_call_are_named_in_its_words(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        alnico.make_recipe(["models/a", "models/b"], **arguments)  # type: ignore[arg-type]
    assert str(refused.value) == message


def test_an_output_of_another_format_is_refused_before_the_merge(run: Run) -> None:
    for name in ("out.onnx", "out.BIN"):
        code, _, stderr = run("merge", "models/a", "models/b", name)
        assert (code, Path(name).exists()) == (8, False)
        assert stderr == (
            f"alnico: {name}: ends in {name[3:]}, but alnico writes safetensors and GGUF; expected a folder or a name that "
            "ends in .safetensors or .gguf. Write out or out.safetensors.\n"
        )
    Path("v1.pt").mkdir()
    assert run("merge", "models/a", "models/b", "v1.pt")[0] == 0
