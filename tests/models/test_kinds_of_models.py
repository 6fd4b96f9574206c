"""The table of docs/models-in-python.md: every function is called with every kind of model, each cell as it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

import alnico
from alnico.errors import AlnicoError
from alnico.models.open_models import path_of
from made import save_model

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and torch
PAGE = Path(__file__).parents[2] / "docs" / "models-in-python.md"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc2(self.fc1(x))
        return scores


def near(base: nn.Module, seed: int) -> Any:
    moved = copy.deepcopy(base)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return moved


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def adapted(base: nn.Module) -> Any:
    module = peft.get_peft_model(
        copy.deepcopy(base),  # type: ignore[arg-type]
        peft.LoraConfig(r=1, target_modules=["fc1"]),
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    return module


torch.manual_seed(3)
BASE = Net()
FIRST, SECOND = near(BASE, 1), near(BASE, 2)
FACTORS = {"fc1": (np.ones((1, 3), np.float32), np.ones((4, 1), np.float32), 0.5)}
TAU = alnico.TaskVector(FIRST, BASE)
MERGE = {"merge_method": "linear"}


def kinds(path: Path) -> dict[str, list[Any]]:
    """The model FIRST (or one near it) as every kind, by the columns of the table."""
    return {
        "path, hub id": [str(path), path, alnico.open_model(path)],
        "dict": [arrays(FIRST), FIRST.state_dict()],
        "module": [FIRST, nn.DataParallel(FIRST), torch.compile(FIRST, backend="eager")],
        "PEFT module": [adapted(BASE)],
        "task vector": [TAU],
        "lazy model": [TAU.on(BASE)],
    }


def score(model: Any) -> float:
    """How near a model is to 0, which is a module here: one of the models always is."""
    return -sum(float(value.detach().square().sum()) for value in model.state_dict().values())


def planned(model: Any) -> Any:
    recipe = {**MERGE, "models": [model]}
    alnico.plan(recipe)
    return alnico.merge(recipe, "merged", overwrite=True)


CALLS: dict[str, Callable[[Any], Any]] = {
    "merge_models(models, base=...)": lambda m: alnico.merge_models([m, SECOND], "ties", base=BASE),
    "merge_state_dicts(state_dicts, base=...)": lambda m: alnico.merge_state_dicts([m, SECOND], base=BASE),
    "TaskVector(finetuned, base)": lambda m: alnico.TaskVector(m, BASE).norm(),
    "tau.on(model)": lambda m: TAU.on(m).state_dict(),
    "analyze(models, base=...)": lambda m: alnico.analyze([SECOND, m], base=BASE),
    "compare(parents, merged, base=...)": lambda m: alnico.compare([m, SECOND], m, base=BASE),
    "diff(a, b)": lambda m: alnico.diff(m, m),
    "inspect(model)": alnico.inspect,
    "suggest(models, base=...)": lambda m: alnico.suggest([m, SECOND], base=BASE).merge(),
    "norm_weights(models, base=...)": lambda m: alnico.norm_weights([m, SECOND], base=BASE),
    "evaluate(models, score, base=...)": lambda m: alnico.evaluate([m, SECOND], score, base=BASE),
    "curve(base, models, score)": lambda m: alnico.curve(BASE, [m, SECOND], score, scale=[0.5]),
    "soup(models, score, base=...)": lambda m: alnico.soup([m, SECOND], score, base=BASE),
    "search_weights(models, score, base=...)": lambda m: alnico.search_weights(
        [m, SECOND], score, base=BASE, trials=2
    ),
    "search_scales(base, models, score)": lambda m: alnico.search_scales(BASE, [m, SECOND], score, trials=2),
    "search(recipe, tasks=score)": lambda m: alnico.search(
        {
            "merge_method": "task_arithmetic",
            "base_model": BASE,
            "models": [m, SECOND],
            "parameters": {"weight": {"search": [0.0, 1.0]}},
        },
        tasks=score,
        trials=2,
    ),
    "adamerge(models, base=..., inputs=...)": lambda m: alnico.adamerge(
        [m, SECOND], base=BASE, inputs=torch.ones(2, 3), steps=1
    ),
    "make_recipe(models)": lambda m: alnico.make_recipe([m]),
    "open_model(model)": alnico.open_model,
    "fisher_statistics(model, out, inputs=...)": lambda m: alnico.fisher_statistics(
        m, "fisher", inputs=torch.ones(2, 3), overwrite=True
    ),
    "gram_statistics(models, out, inputs=...)": lambda m: alnico.gram_statistics(
        [m], "gram", inputs=torch.ones(2, 3), overwrite=True
    ),
    "lora.fold(base, adapters)": lambda m: alnico.lora.fold(m, FACTORS),
    "lora.combine(adapters)": lambda m: alnico.lora.combine(["adapter" if path_of(m) else m, FACTORS]),
    "lora.extract(tuned, base)": lambda m: [
        alnico.lora.extract(m, base, out, rank=1, overwrite=True)
        for base, out in ((BASE, None), ("base", "extracted"))
    ],
    "merge(recipe, out)`, `plan(recipe)": planned,
    "verify(out)": alnico.verify,
    "reproduce(out)": alnico.reproduce,
    "sign(out, key)": lambda m: alnico.sign(m, "key.pem"),
    "push(out, name)": lambda m: alnico.push(m, "owner/name"),
}
"""A call of each function of the table, where it can be with a second model of another kind."""

ELSEWHERE = ("fisher_statistics", "gram_statistics", "verify", "reproduce", "sign", "push")
"""Functions that need tasks, a finished merge or the hub: their own tests run them with paths."""


def rows(column: str) -> list[list[str]]:
    """The rows of the table of the page whose first column has this name."""
    lines = PAGE.read_text("utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {column} |"))
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return [found[0], *found[2:]]


TABLE = rows("function")
MESSAGES = dict(rows("cell")[1:])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    for name, model in (("base", BASE), ("first", FIRST)):
        save_model(root / name, {n: ("F32", v) for n, v in arrays(model).items()})
    adapted(BASE).save_pretrained(root / "adapter")
    return root / "first"


def test_the_table_has_every_function_and_every_kind(path: Path) -> None:
    assert TABLE[0][1:] == list(kinds(path))
    assert [row[0].strip("`") for row in TABLE[1:]] == list(CALLS)
    assert {cell for row in TABLE[1:] for cell in row[1:]} == {"yes", *MESSAGES}


@pytest.mark.parametrize("row", TABLE[1:], ids=lambda row: row[0].strip("`"))
def test_a_function_does_with_each_kind_what_the_table_says(
    row: list[str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    function = CALLS[row[0].strip("`")]
    for (kind, models), cell in zip(kinds(path).items(), row[1:], strict=True):
        for model in models:
            if cell != "yes":
                with pytest.raises(AlnicoError) as caught:
                    function(model)
                assert MESSAGES[cell] in str(caught.value), (kind, str(caught.value))
            elif not (kind == "path, hub id" and row[0].strip("`").startswith(ELSEWHERE)):
                assert function(model) is not None


def test_every_kind_gives_the_bits_of_the_files(path: Path) -> None:
    expected = alnico.merge_state_dicts([path, SECOND], "ties", base=BASE)
    changes = alnico.analyze([path, SECOND], base=BASE).whole
    for kind, models in kinds(path).items():
        if kind in ("PEFT module", "task vector", "lazy model"):
            continue  # models near FIRST
        for model in models:
            merged = alnico.merge_state_dicts([model, SECOND], "ties", base=BASE)
            assert all(torch.equal(merged[name], expected[name]) for name in expected), kind
            assert alnico.analyze([model, SECOND], base=BASE).whole == changes, kind
