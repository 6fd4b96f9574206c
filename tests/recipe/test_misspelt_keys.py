"""A sweep: each key of recipes, tasks and searches is misspelt, and one message names the right key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from alnico.errors import AlnicoError
from alnico.evaluation.task_file import CALL, CLASSIFICATION, LM_EVAL, PERPLEXITY, TASK, read_tasks
from alnico.recipe.keys import (
    CHECKPOINTS,
    LINES,
    NORM_WEIGHT,
    PATH,
    REFERENCE,
    SCHEDULE_WEIGHT,
    TOKEN,
    TOKENIZER,
)
from alnico.recipe.load import parse_recipes
from alnico.tune.search.settings import HALVING_KEYS, KEYS, read_search
from alnico.tune.search.space import SEARCH_KEYS
from made import save_model

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that an example names."""
    made = tmp_path_factory.mktemp("run")
    for step in range(8):
        save_model(made / "models" / "run" / f"checkpoint-{step}", {"w": ("F32", np.ones(2, np.float32))})
    return made


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


OF_AUTHOR = ("modules", "tokens", "labels", "slice")
"""Keys below these are names that the author chooses."""

NO_PHRASE = re.compile(
    r"  |of \. |has none|None|''|\"\"|(?<!\.)\.\.(?!\.)| [.:,;]|\(\)| has no options|is missing|needs"
)
"""What no answer to a misspelt key may hold: an empty or broken phrase, and the same key as missing."""

RECIPE = """\
merge_method: ties
base_model: {model: {path: base, revision: main}, lora: adapter}
models:
- {model: a, parameters: {weight: {from: l2_norm, mode: exp, beta: 1, scale: 1, per: model}}}
- model: b
  parameters: {weight: {from: l2_norm, mode: exp, beta: 1, scale: 1, per: model}, density: [{filter: mlp, value: 0.5}, 0.3]}
methods:
- {filter: norm, merge_method: linear, preset: uniform_soup, parameters: {weight: [1, 2]}}
lines: {alpha: 0.5, beta: 0.5}
protect: {model: a, gram: stats, energy: 0.5, others: keep}
tokenizer:
  source: b
  tokens: {a: {source: b, force: true}, c: {source: {kind: model_token, model: b, token: x}}}
  pad_to_multiple_of: 8
  tables: [emb]
  approximate: omp
  atoms: 8
chat_template: auto
out_dtype: bfloat16
missing: error
unrelated: allow
seed: 1
"""
RUN = """\
merge_method: linear
checkpoints: {run: models/run, last: 2, every: 2, steps: [0, 7], ema: false}
parameters: {weight: {from: schedule, shape: ema, decay: 0.9}}
"""

MODULES = """\
merge_method: slerp
modules:
  text: {models: [{model: a}, {model: b}], parameters: {t: 0.5}}
  vision:
    slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}], parameters: {t: 0.5}}]
base_model: a
dtype: bfloat16
"""
SEARCH = """\
merge_method: {choice: [ties]}
base_model: base
models:
- {model: a, parameters: {weight: {search: [0.1, 1], log: true}}}
- {model: b, parameters: {weight: {search: [0, 1], step: 0.1}, density: {search: [0.1, 1], layers: 3}}}
search:
  tasks: tasks.yml
  objective: mean
  sampler: tpe
  trials: 10
  seed: 1
  study: mine
  held_out: 0.2
  timeout: 60
  failures: 3
  population: 10
  concentration: 1
  halving: {fraction: 0.3, keep: 0.5}
"""
TASKS = """\
tasks:
- {name: a, type: classification, weight: 1, data: x.jsonl, text: t, label: l, head: own, labels: [u, v], encoder: e, pooling: mean, logit_scale: 2, max_length: 9, batch_size: 2, limit: 3, precision: float32}
- {name: b, type: perplexity, data: y.txt, window: 3, stride: 3, limit: 2, batch_size: 1, precision: float32}
- {name: c, type: lm_eval, tasks: [arc], metric: acc, num_fewshot: 0, limit: 1, batch_size: 1, goal: max}
- {name: d, type: call, function: "m:f", kind: encoder, metric: acc, goal: max}
"""


def keys_of(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Every key of YAML text: the key that it is below, itself, and where it stands."""

    def walk(node: yaml.Node, below: str) -> Iterator[tuple[str, str, int, int]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if below not in OF_AUTHOR:
                    yield below, key.value, key.start_mark.index, key.end_mark.index
                yield from walk(value, key.value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from walk(item, below)

    for document in yaml.compose_all(text):
        yield from walk(document, "")


def slips(key: str) -> set[str]:
    """Return what people write for a key: a letter left out, doubled, or swapped; other separators, case and number."""
    middle = len(key) // 2
    words = {
        key[:middle] + key[middle + 1 :],
        key[:-1],
        key[:middle] + key[middle] * 2 + key[middle + 1 :],
        key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :],
        key.replace("_", "-"),
        key.replace("_", ""),
        key.replace("_", " "),
        key[:-1] if key.endswith("s") else f"{key}s",
        re.sub(r"_(\w)", lambda letter: letter[1].upper(), key),
        key.capitalize(),
        key.upper(),
    }
    return {word for word in words if word != key and len(key) > 2 and len(word) > 1}


def unanswered(text: str, read: Callable[[str], object], seen: set[tuple[str, str, str]]) -> list[str]:
    """Return the slips in a text that are not answered by one message with the right key."""
    valid = {key for _, key, _, _ in keys_of(text)}
    wrong = []
    for below, key, begin, end in keys_of(text):
        for word in sorted(slips(key)):
            if (below, key, word) in seen or word in valid:
                continue
            seen.add((below, key, word))
            try:
                read(text[:begin] + word + text[end:])
                told = ""
            except AlnicoError as error:
                told = str(error)
            hint = (
                re.escape(f"{word!r}. Did you mean {key}?")
                + "|"
                + rf"\.{re.escape(word)} is .* Did you mean {key}\?"
            )
            if not re.search(hint, told) or len(told.splitlines()) > 1 or NO_PHRASE.search(told):
                wrong.append(f"{below}.{key} as {word!r}: {told}")
    return wrong


def read_recipe(text: str) -> object:
    return parse_recipes(text, "recipe.yml")


def test_a_misspelt_key_of_an_example_is_answered_with_the_right_one() -> None:
    seen: set[tuple[str, str, str]] = set()
    assert [line for path in EXAMPLES for line in unanswered(path.read_text(), read_recipe, seen)] == []
    assert len(seen) > 250


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_misspelt_key_of_every_example_is_answered_with_the_right_one(path: Path) -> None:
    assert unanswered(path.read_text(), read_recipe, set()) == []


@pytest.mark.parametrize("text", [RECIPE, RUN, MODULES], ids=["everything", "run", "modules"])
def test_a_misspelt_key_of_a_recipe_is_answered_with_the_right_one(text: str) -> None:
    read_recipe(text)
    assert unanswered(text, read_recipe, set()) == []


def test_a_misspelt_key_of_a_search_is_answered_with_the_right_one() -> None:
    read_search(SEARCH)
    assert unanswered(SEARCH, read_search, set()) == []


def test_a_misspelt_key_of_tasks_is_answered_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yml"

    def read(text: str) -> None:
        path.write_text(text)
        try:
            read_tasks(path, allow_code=True)
        except AlnicoError as error:  # the files of the tasks are not there
            unknown = [
                line for line in error.args if "cannot be read" not in line and "is missing" not in line
            ]
            raise AlnicoError(
                *[line.removeprefix(f"{path}:") for line in unknown if "m:f" not in line]
            ) from None

    assert unanswered(TASKS, read, set()) == []


def test_the_sweep_has_every_key() -> None:
    held = {key for text in (RECIPE, RUN, MODULES, SEARCH, TASKS) for _, key, _, _ in keys_of(text)}
    held |= {key for path in EXAMPLES for _, key, _, _ in keys_of(path.read_text())}
    keys = {*KEYS, *SEARCH_KEYS, *HALVING_KEYS, *TASK, *CLASSIFICATION, *PERPLEXITY, *CALL, *LM_EVAL, *LINES, *NORM_WEIGHT, *SCHEDULE_WEIGHT, *CHECKPOINTS, *TOKENIZER, *TOKEN, *PATH, *REFERENCE}  # fmt: skip
    assert keys - held <= {
        "int",
        "path",
        "alpha",
        "report",
        "storage",
        "include_path",
        "override_architecture",
    }
