"""``alnico adamerge`` on the made tasks: the recipe, its course, what it says, and labels that nobody reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertModel

import alnico
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.task_file import read_tasks
from alnico.tune.adamerge import learn
from made_tasks import Made, save_tasks
from tune.test_adamerge import learning_options

Run = Callable[..., tuple[int, str, str]]


def entries(made: Made) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(made.valid.read_text())["tasks"]
    return [{**e, "data": str(made.valid.parent / e["data"]), "encoder": str(made.base)} for e in found]


def test_the_command_writes_a_recipe_and_its_course(made: Made, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "recipe.yml"
    words = ["--base", str(made.base), "--tasks", str(made.valid), "--out", str(out), "--per", "layer"]
    code, shown, said = run("adamerge", *made.references, *words, "--steps", "12", "--learning-rate", "0.03")
    assert code == 0
    course = json.loads((tmp_path / "recipe.course.json").read_text())
    assert [step["step"] for step in course["steps"]] == list(range(1, 13))
    losses = [step["loss"] for step in course["steps"]]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.05
    recipe = yaml.safe_load(out.read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    weights = recipe["models"][0]["parameters"]["weight"]
    assert {"encoder.layer.0.", "encoder.layer.1."} < {w["filter"] for w in weights[:-1]}
    assert [[w["value"] for w in m["parameters"]["weight"][:-1]] for m in recipe["models"]] == np.array(
        course["coefficients"]
    ).T.tolist()
    table = shown.splitlines()
    assert table[0].split() == ["layer", "tuned-pets", "tuned-food", "tuned-sky"]
    row = next(line.split() for line in table if line.startswith("encoder.layer.0 "))
    assert [float(v) for v in row[1:]] == pytest.approx(
        course["coefficients"][course["groups"].index("encoder.layer.0")], abs=1e-4
    )
    assert said.count("step ") == 12
    assert (
        f"note: learned on inputs of {made.valid}, without labels (60 of pets, 60 of food, 60 of sky); "
        in said
    )
    assert run("merge", str(out), str(tmp_path / "merged"))[0] == 0


def test_labels_are_never_read(made: Made, tmp_path: Path) -> None:
    recipes = []
    for labels in ("right", "wrong", "none"):
        tasks = []
        for entry in entries(made)[:1]:
            rows = [json.loads(line) for line in Path(entry["data"]).read_text().splitlines()]
            classes = list(entry["labels"])
            for row in rows:
                if labels == "none":
                    del row["label"]
                elif labels == "wrong":
                    row["label"] = classes[(classes.index(row["label"]) + 1) % len(classes)]
            data = tmp_path / f"{entry['name']}-{labels}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            tasks.append({**entry, "data": str(data), **({"label": None} if labels == "none" else {})})
        path = save_tasks(tmp_path / f"{labels}.yml", tasks)
        recipes.append(
            alnico.adamerge(made.references, base=made.base, tasks=path, steps=3, learning_rate=0.02).recipe
        )
    assert recipes[0] == recipes[1] == recipes[2]


def test_a_recipe_elsewhere_finds_its_models(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.base.parent)
    models = [path.name for path in made.tuned.values()]
    found = alnico.adamerge(
        models, base="base", tasks={"tasks": entries(made)}, out=tmp_path / "mine.yml", steps=1, plus=True
    )
    monkeypatch.chdir(tmp_path.parent)
    recipe = yaml.safe_load(found.recipe)
    assert not Path(recipe["base_model"]).is_absolute()
    assert {job.kind for job in alnico.plan(tmp_path / "mine.yml").jobs} == {"mix"}
    assert recipe["merge_method"] == "ties"
    assert recipe["parameters"] == {"density": 0.2, "elect": "mass", "divide": "none", "scope": "model"}


def test_the_encoder_of_checkpoints_with_a_head_is_learned_and_the_head_is_not(
    made: Made, tmp_path: Path
) -> None:
    config = BertConfig.from_pretrained(made.base)
    for i, name in enumerate(("base", "one", "two")):
        torch.manual_seed(7)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * i * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        for file in made.base.glob("tokenizer*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    subject = open_subject(tmp_path / "base")
    models = [str(tmp_path / name) for name in ("one", "two")]
    found = learn(
        models,
        str(tmp_path / "base"),
        read_tasks({"tasks": entries(made)}),
        subject,
        learning_options(steps=2, learning_rate=0.05),
    )
    assert {"classifier.weight", "classifier.bias"} <= set(found.fixed)
    assert "bert.encoder.layer.0.output.dense.weight" not in found.fixed
    alnico.merge(alnico.load_recipe(found.recipe), tmp_path / "out")
    with alnico.open_model(tmp_path / "out") as merged:
        for name, parameter in subject.module("encoder").named_parameters():
            np.testing.assert_array_equal(
                merged.read(f"bert.{name}"), parameter.detach().numpy(), err_msg=name
            )


def test_what_is_there_is_not_written_over(made: Made, tmp_path: Path, run: Run) -> None:
    (tmp_path / "recipe.course.json").write_text("{}")
    words = ["--base", str(made.base), "--tasks", str(made.valid), "--out", str(tmp_path / "recipe.yml")]
    code, _, said = run("adamerge", *made.references, *words)
    assert code == 8
    assert said == (
        f"alnico: {tmp_path / 'recipe.course.json'}: already exists; expected a new file. Choose another name, or remove it.\n"
    )


def test_a_folder_that_is_not_there_is_told_before_the_first_step(
    made: Made, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "nowhere" / "recipe.yml"
    code, _, said = run(
        "adamerge", *made.references, "--base", str(made.base), "--tasks", str(made.valid), "--out", str(out)
    )
    assert code == 8
    assert (
        said
        == f"alnico: {out}: its folder does not exist; expected one to write into. Create it, or choose another.\n"
    )


def test_a_wrong_option_is_a_mistake_of_the_recipe(made: Made, run: Run) -> None:
    code, _, said = run("adamerge", str(made.base), "--base", str(made.base), "--tasks", str(made.valid))
    assert code == 3
    assert (
        said
        == f"alnico: adamerge: {made.base} is both the base and one of the models; expected models tuned from it. Remove it from the models.\n"
    )


def test_a_model_of_another_start_is_refused_unless_it_is_allowed(
    made: Made, tmp_path: Path, run: Run
) -> None:
    config = BertConfig.from_pretrained(made.base, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    for seed, name in enumerate(("base", "stranger")):
        shutil.copytree(made.base, tmp_path / name)
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(tmp_path / name)
    tasks = {"tasks": [{**entry, "encoder": str(tmp_path / "base")} for entry in entries(made)[:1]]}
    (tmp_path / "tasks.yml").write_text(yaml.safe_dump(tasks))
    words = [
        str(tmp_path / "stranger"),
        "--base",
        str(tmp_path / "base"),
        "--tasks",
        str(tmp_path / "tasks.yml"),
        "--steps",
        "1",
    ]
    code, _, said = run("adamerge", *words)
    assert code == 5
    assert 'or pass unrelated="allow" (--unrelated allow on the command line).' in said
    code, shown, _ = run("adamerge", *words, "--unrelated", "allow")
    assert code == 0
    assert yaml.safe_load(shown)["unrelated"] == "allow"
