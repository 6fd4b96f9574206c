"""docs/recipes.md is true: its tables are the code's, its recipes run, and what it says of them holds."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

import alnico
from alnico.errors import RecipeError
from alnico.recipe.load import load_recipes
from made import family, llama_config, llama_shapes, read_model, save_file, save_model
from made_tokenizers import entry, save_tokenizer
from methods import sides

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "recipes.md").read_text("utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
MERGED = [text for text in BLOCKS if "owner/" not in text]
"""Recipes of models that the fixture has; the others name models of the hub."""
LAYERS = 32
HIDDEN = 8
ROWS = 32
WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(ROWS - 2))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and the adapter, that the page names."""
    root = tmp_path_factory.mktemp("page")
    models = root / "models"
    base, tuned = family(models, 3, dtype="F32", hidden=HIDDEN, layers=LAYERS, vocabulary=ROWS)
    for path, name in zip(tuned, ("coder", "math", "other"), strict=True):
        path.rename(models / name)
    for step in range(500, 4500, 500):
        shutil.copytree(models / "coder", root / "runs" / "coder" / f"checkpoint-{step}")
    for place, name in enumerate(("coder", "math")):
        sides.made("gram", models / name, place).rename(models / f"{name}-gram")
    vocabulary = {t: i for i, t in enumerate(WORDS)}
    save_tokenizer(base, vocabulary, [])

    random = np.random.default_rng(1)
    added = [entry("<|im_start|>", ROWS), entry("<|im_end|>", ROWS + 1)]
    shapes = llama_shapes(HIDDEN, LAYERS, ROWS + 2)
    weights = {n: ("F32", random.standard_normal(s).astype(np.float32)) for n, s in shapes.items()}
    save_model(models / "chat", weights, llama_config(HIDDEN, LAYERS, ROWS + 2))
    save_tokenizer(models / "chat", vocabulary, added)

    text = llama_shapes(HIDDEN, LAYERS, ROWS)
    seeing = {n.replace("model.", "model.language_model.", 1): s for n, s in text.items()}
    seeing |= {f"model.vision_tower.layers.{i}.mlp.weight": (4, 4) for i in range(2)}
    seeing |= {"model.multi_modal_projector.weight": (HIDDEN, 4)}
    config = {"model_type": "llava", "text_config": llama_config(HIDDEN, LAYERS, ROWS)}
    for name in ("seeing", "watching"):
        save_model(
            models / name,
            {n: ("F32", random.standard_normal(s).astype(np.float32)) for n, s in seeing.items()},
            config,
        )

    blocks = [f"model.diffusion_model.input_blocks.{i}.0.weight" for i in range(1, 3)]
    start = {n: random.standard_normal((4, 4)).astype(np.float32) for n in blocks}
    for name in ("photo", "anime"):
        moved = {
            n: ("F32", v + np.float32(0.01) * random.standard_normal((4, 4)).astype(np.float32))
            for n, v in start.items()
        }
        save_file(models / f"{name}.safetensors", moved)

    adapter = root / "adapters" / "sql"
    at = "base_model.model.model.layers.3.self_attn.q_proj.lora_"
    low = {at + "A.weight": (2, HIDDEN), at + "B.weight": (HIDDEN, 2)}
    save_file(
        adapter / "adapter_model.safetensors", {n: ("F32", np.ones(s, np.float32)) for n, s in low.items()}
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (root / "stats").mkdir()
    sides.made("gram", models / "coder", 0).rename(root / "stats" / "coder")
    return root


def test_the_tables_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("make_recipes", DOCS / "make_recipes.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    for path in generator.PAGES:
        written = path.read_text("utf-8")
        assert generator.page(written) == written, (
            f"docs/{path.name} is out of date: run `python docs/make_recipes.py`"
        )


def test_the_page_has_every_table_of_keys() -> None:
    from alnico.recipe import keys

    tables = {name for name, value in vars(keys).items() if name.isupper() and isinstance(value, dict)}
    assert set(re.findall(r"<!-- keys (\w+) -->", PAGE)) == tables


def test_every_recipe_of_the_page_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert len(BLOCKS) == PAGE.count("```yaml")
    for text in BLOCKS:
        assert not [note for recipe in load_recipes(text) for note in recipe.notes if "no effect" in note]


def test_every_line_of_the_table_of_what_recipes_can_do_is_a_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    table = PAGE.partition("| what | in the recipe |\n")[2].partition("\n\n")[0]
    rows = table.splitlines()[1:]
    assert len(rows) == 17
    for row in rows:
        given = [yaml.safe_load(code) for code in re.findall(r"`([^`]+)`", row.split(" | ")[-1])]
        recipe = {key: value for keys in given if keys for key, value in keys.items()}
        assert recipe
        if "experts" in recipe:
            assert alnico.load_recipe(recipe).notes == ()
            continue
        models = (
            {}
            if {"models", "checkpoints", "slices", "modules"} & recipe.keys()
            else {"models": ["base", "coder", "math"]}
        )
        method = (
            {"merge_method": "passthrough"}
            if "slices" in recipe
            else {"merge_method": "ties", "base_model": "base"}
        )
        assert alnico.load_recipe({**method, **models, **recipe}).notes == ()


def test_the_page_of_examples_names_them_all() -> None:
    examples = DOCS.parent / "examples"
    named = re.findall(r"`([\w-]+\.yml)`", (examples / "README.md").read_text("utf-8"))
    assert sorted(named) == sorted(p.name for p in examples.glob("*.yml"))


@pytest.mark.parametrize("text", MERGED, ids=range(len(MERGED)))
def test_a_recipe_of_the_page_can_be_planned(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert all(plan.jobs for plan in alnico.plan_documents(text))


@pytest.mark.slow
@pytest.mark.parametrize("text", MERGED, ids=range(len(MERGED)))
def test_a_recipe_of_the_page_is_merged(
    text: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (result,) = alnico.merge_documents(text, tmp_path / "out")
    assert read_model(result.path).keys() == {job.name for job in result.plan.jobs}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tunes of a base, of two layers."""
    root = tmp_path_factory.mktemp("small")
    family(root, 2, dtype="F32", hidden=HIDDEN, layers=2)
    return root


def test_a_filter_is_a_substring_a_whole_name_or_an_expression(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small)
    base, one = read_model(small / "base"), read_model(small / "tuned-0")
    cases = [
        {"filter": "=model.norm.weight", "value": 0.5},
        {"filter": r"re:layers\.\d\.mlp\.(up|gate)", "value": 0.25},
        {"filter": "mlp", "value": 0.75},
        {"value": 1},
    ]
    recipe = {
        "merge_method": "linear",
        "models": ["tuned-0"],
        "parameters": {"weight": cases, "normalize": False},
    }
    part = {"weight": [{"filter": "=norm", "value": 9}, 1], "normalize": False}
    with pytest.raises(RecipeError, match=r"'=norm', but no tensor has that name"):
        alnico.merge({**recipe, "parameters": part}, tmp_path / "out")
    alnico.merge(recipe, tmp_path / "out")
    out = read_model(tmp_path / "out")
    assert base.keys() == out.keys()
    for name, values in one.items():
        weight = 0.5 if name == "model.norm.weight" else 1
        if ".mlp." in name:
            weight = 0.75 if "down" in name else 0.25
        np.testing.assert_allclose(out[name], weight * values, rtol=1e-6)
