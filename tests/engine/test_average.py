"""The average of a run: of a model that the test trains, without what is half-written, by one command or one line of a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import MismatchError, ModelError, RecipeError
from alnico.numerics.decay_schedule import SHAPES, decay_coefficients
from made import read_model, save_file, save_model
from made_pickles import pickled, zipped
from made_shards import metadata, partitions, put_files, rank_files, two_rows, values

Run = Callable[..., tuple[int, str, str]]
Network = dict[str, np.ndarray]
INPUTS, HIDDEN, BATCH, CHECKPOINTS, APART = 6, 24, 8, 24, 25


def data(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and a smooth function of them with noise."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, INPUTS))
    return x, np.sin(x[:, 0]) + x[:, 1] * x[:, 2] / 2 + 0.5 * random.standard_normal(rows)


def loss(network: Network, x: np.ndarray, y: np.ndarray) -> float:
    hidden = np.tanh(x @ network["in.weight"].T + network["in.bias"])
    return float(np.mean((hidden @ network["out.weight"][0] - y) ** 2))


def training() -> Iterator[tuple[int, Network]]:
    """Train a small network at a constant rate; yields its checkpoints, the last 24 of the run."""
    random = np.random.default_rng(0)
    net = {
        "in.weight": random.standard_normal((HIDDEN, INPUTS)) / INPUTS**0.5,
        "in.bias": np.zeros(HIDDEN),
        "out.weight": random.standard_normal((1, HIDDEN)) / HIDDEN**0.5,
    }
    x, y = data(1, 4096)
    first = 40 * APART
    for step in range(1, first + CHECKPOINTS * APART + 1):
        rows = random.integers(0, len(x), BATCH)
        hidden = np.tanh(x[rows] @ net["in.weight"].T + net["in.bias"])
        error = 2 * (hidden @ net["out.weight"][0] - y[rows]) / BATCH
        inside = error[:, None] * net["out.weight"] * (1 - hidden**2)
        for name, change in (
            ("out.weight", (error @ hidden)[None]),
            ("in.weight", inside.T @ x[rows]),
            ("in.bias", inside.sum(0)),
        ):
            net[name] = net[name] - 0.1 * change
        if step > first and step % APART == 0:
            yield step, {name: value.astype(np.float32) for name, value in net.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Network]]:
    """The folder of a run, as transformers leaves it, and its checkpoints by step."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoints = dict(training())
    for step, network in checkpoints.items():
        place = folder / "run" / f"checkpoint-{step}"
        save_model(place, {n: ("F32", v) for n, v in network.items()}, {"architectures": ["Net"]})
        (place / "optimizer.pt").write_bytes(b"not read")
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder, checkpoints


@pytest.fixture
def here(trained: tuple[Path, dict[int, Network]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a link to the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained[0] / "run")
    return tmp_path


def mean(networks: Sequence[Network], weights: Sequence[float]) -> Network:
    return {
        name: sum(w * n[name].astype(float) for w, n in zip(weights, networks, strict=True))
        for name in networks[0]
    }


def test_the_averaged_model_beats_its_last_checkpoint(
    here: Path, trained: tuple[Path, dict[int, Network]], run: Run
) -> None:
    networks = list(trained[1].values())
    assert len(networks) == CHECKPOINTS
    code, line, notes = run("average", "run", "averaged")
    assert (code, notes) == (0, "")
    assert line.startswith("averaged: 3 tensors, 192 parameters, ")
    averaged = read_model(here / "averaged")
    for name, expected in mean(networks, [1 / CHECKPOINTS] * CHECKPOINTS).items():
        np.testing.assert_allclose(averaged[name], expected, atol=1e-6)
    held_out = data(2, 4096)
    assert loss(averaged, *held_out) < loss(networks[-1], *held_out) - 0.01
    assert loss(averaged, *held_out) < min(loss(network, *held_out) for network in networks)


@pytest.mark.usefixtures("here")
def test_one_line_of_a_recipe_is_the_same_average(trained: Any) -> None:
    Path("recipe.yml").write_text("merge_method: linear\ncheckpoints: {run: run, last: 8}\n")
    by_recipe = alnico.merge("recipe.yml", "by-recipe")
    by_function = alnico.average("run", "by-function", last=8)
    assert by_recipe.digests == by_function.digests
    steps = list(trained[1])[-8:]
    assert [s.label for s in by_recipe.plan.models] == [f"run/checkpoint-{step}" for step in steps]
    again = alnico.merge("by-recipe/mergekit_config.yml", "again")  # which names the models themselves
    assert again.digests == by_recipe.digests
    assert "checkpoints" not in Path("by-recipe/mergekit_config.yml").read_text()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_mean_with_its_coefficients(here: Path, trained: Any, shape: str) -> None:
    result = alnico.average("run", "out", shape=shape, every=2, last=5)
    networks = list(trained[1].values())[::-1][::2][:5][::-1]
    for name, expected in mean(networks, decay_coefficients(shape, 5)).items():
        np.testing.assert_allclose(read_model(here / "out")[name], expected, atol=1e-6)
    assert len(result.plan.models) == 5


def chosen(**options: Any) -> list[int]:
    """The steps of the models of a recipe."""
    recipe = alnico.load_recipe({"merge_method": "linear", "checkpoints": {"run": "run", **options}})
    return [int(reference.rpartition("-")[2]) for reference in recipe.references]


@pytest.mark.usefixtures("here")
def test_steps_every_and_last_choose_checkpoints(trained: Any) -> None:
    steps = list(trained[1])
    first = steps[0]
    assert chosen() == steps
    assert chosen(last=3) == steps[-3:]
    assert chosen(every=5) == steps[::-1][::5][::-1]
    assert chosen(steps=[first + 50, first + 125]) == steps[2:6]
    assert chosen(steps=[first, first + 200, 50]) == steps[0:9:2]
    assert chosen(steps=[first, first + 200], every=3, last=2) == [steps[5], steps[8]]


@pytest.mark.usefixtures("here")
def test_a_list_and_a_glob_are_put_in_the_order_of_steps(trained: Any) -> None:
    one, *_, other = trained[1]
    for checkpoints in (
        [f"run/checkpoint-{other}", f"run/checkpoint-{one}"],
        {"run": "run/*", "steps": [one, other, other - one]},
    ):
        recipe = alnico.load_recipe({"merge_method": "linear", "checkpoints": checkpoints})
        assert recipe.references == (f"run/checkpoint-{one}", f"run/checkpoint-{other}")


def test_revisions_of_the_hub_are_named_without_asking_it() -> None:
    recipe = alnico.load_recipe(
        {
            "merge_method": "linear",
            "checkpoints": {"run": "EleutherAI/pythia-70m@step*", "steps": [1000, 3000, 1000]},
        }
    )
    assert recipe.references == tuple(f"EleutherAI/pythia-70m@step{n}" for n in (1000, 2000, 3000))


def test_files_of_the_trainer_are_not_copied(here: Path) -> None:
    alnico.average("run", "out", last=2)
    assert sorted(p.name for p in (here / "out").iterdir()) == [
        "README.md", "alnico.lock.json", "config.json", "mergekit_config.yml", "model.safetensors"
    ]  # fmt: skip


def test_the_plan_and_the_recipe_are_printed(here: Path, trained: Any, run: Run) -> None:
    code, text, _ = run("average", "run", "out", "--last", "2", "--shape", "1-sqrt", "--dry-run")
    assert code == 0
    a, b = list(trained[1])[-2:]
    lines = [
        "1-sqrt: a schedule over 2 models", f"  0.707107  run/checkpoint-{a}", f"  0.292893  run/checkpoint-{b}"
    ]  # fmt: skip
    assert "".join(f"weights   {line}\n" for line in lines) in text
    assert not (here / "out").exists()
    code, text, _ = run("average", "run", "out", "--steps", f"{a},{b}", "--shape", "1,0.5", "--print-recipe")
    assert code == 0
    assert alnico.load_recipe(text).references == (f"run/checkpoint-{a}", f"run/checkpoint-{b}")
    assert not (here / "out").exists()


def half_written(kind: str, folder: Path, whole: Path) -> None:
    """Write a checkpoint that is not finished, in the format of a whole one."""
    if kind == "an empty folder":
        folder.mkdir()
    elif kind == "an index without its shards":
        shutil.copytree(whole, folder)
        tensors = {n: ("F32", v) for n, v in read_model(whole).items()}
        (folder / "model.safetensors").unlink()
        save_model(folder, tensors, shards=2)
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif kind == "the first shard alone":
        folder.mkdir()
        save_file(folder / "model-00001-of-00002.safetensors", {"w": ("F32", np.ones(3, np.float32))})
    elif kind == "a truncated file":
        shutil.copytree(whole, folder)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "a truncated pickle":
        folder.mkdir()
        (folder / "pytorch_model.bin").write_bytes(zipped(pickled({"w": values((2, 3))}))[:-40])
    elif kind == "a rank that is missing":
        files = rank_files({"w": values((2, 3))}, {"w": values((2, 3))})
        put_files(folder, dict(list(files.items())[:1]))
    elif kind == "a partition of DeepSpeed that is missing":
        files = partitions([values((3,))], [values((3,))], shapes=[{"w": (6,)}])
        put_files(folder, {n: d for n, d in files.items() if "rank_1" not in n})
    elif kind == "shards without .metadata":
        put_files(folder, two_rows()[2])
    elif kind == ".metadata without a shard":
        entries, places, files = two_rows()
        put_files(
            folder, {".metadata": metadata(entries, places)} | {n: d for n, d in files.items() if "__0" in n}
        )


KINDS = (
    "an empty folder", "an index without its shards", "the first shard alone", "a truncated file", "a truncated pickle",
    "a rank that is missing", "a partition of DeepSpeed that is missing", "shards without .metadata", ".metadata without a shard",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_written_last_checkpoint_is_left_out_and_named(
    kind: str, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, checkpoints = trained
    for step in list(checkpoints)[-3:]:
        shutil.copytree(folder / "run" / f"checkpoint-{step}", Path("run") / f"checkpoint-{step}")
    whole = list(checkpoints)[-3:]
    half_written(kind, Path("run", "checkpoint-99999"), Path("run", f"checkpoint-{whole[-1]}"))
    before = sorted(Path("run").rglob("*"))
    result = alnico.average("run", "out", last=3)
    assert [s.label for s in result.plan.models] == [f"run/checkpoint-{step}" for step in whole]
    (note,) = [n for n in result.plan.notes if "half-written" in n]
    assert note.startswith("left out, as it cannot be read and may be half-written: run/checkpoint-99999")
    assert sorted(Path("run").rglob("*")) == before  # nothing is deleted
    assert (
        "note: left out, as it cannot be read and may be half-written: run/checkpoint-99999"
        in run("average", "run", "other")[2]
    )
    with pytest.raises(RecipeError) as caught:
        alnico.average("run", "third", last=4)
    assert str(caught.value) == (
        "run: has 3 such checkpoints, without run/checkpoint-99999, which may be half-written; expected the last 4. Ask for 3, or leave "
        "last out."
    )


def test_a_run_of_which_nothing_can_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save_file(
            Path(f"run/checkpoint-{step}/adapter_model.safetensors"),
            {"w.lora_A.weight": ("F32", np.ones((1, 2)))},
        )
        Path(f"run/checkpoint-{step}/adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        alnico.average("run", "out")
    assert str(caught.value) == (
        "run/checkpoint-2: is a LoRA adapter, expected a whole model. Name it together with its base: BASE+run/checkpoint-2."
    )


def test_a_damaged_checkpoint_before_the_last_is_an_error(here: Path) -> None:
    shutil.copytree(here / "run", here / "other")
    oldest = min((here / "other").iterdir(), key=lambda p: int(p.name.rpartition("-")[2]))
    (oldest / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"other/checkpoint-1025: has no .safetensors or .bin file"):
        alnico.average("other", "out")


def test_checkpoints_of_different_shapes_are_one_message(here: Path) -> None:
    shutil.copytree(here / "run", here / "other")
    save_model(
        here / "other" / "checkpoint-1050",
        {
            "in.weight": ("F32", np.ones((HIDDEN, INPUTS + 1), np.float32)),
            "in.bias": ("F32", np.ones(HIDDEN, np.float32)),
            "out.weight": ("F32", np.ones((1, HIDDEN), np.float32)),
        },
    )
    with pytest.raises(MismatchError) as caught:
        alnico.average("other", "out")
    (message,) = caught.value.args
    assert "in.weight" in message
    assert "other/checkpoint-1050" in message


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "too many": (("run", "--last", "99"), "run: has 24 such checkpoints; expected the last 99. Ask for 24, or leave last out."),
    "a step that is not there": (
        ("run", "--steps", "1025,1100,10"),
        "run: has no checkpoint of step 1035; expected 8, from 1025 to 1100, every 10. Change steps, or leave out its third number to take "
        "what is there.",
    ),
    "steps outside the run": (
        ("run", "--steps", "1,2"),
        "run: has no checkpoint in these steps; it has 1025 to 1600. Change steps.",
    ),
    "steps backwards": (
        ("run", "--steps", "3,2"),
        "--steps is [3, 2]; expected [from, to] or [from, to, every], whole numbers with from <= to and every above 0.",
    ),
    "a shape of a slip": (
        ("run", "--shape", "cosin"),
        "--shape is 'cosin'; expected one of uniform, linear, cosine, 1-sqrt, ema, wma, or a list with a factor for each checkpoint. Did you "
        "mean cosine?",
    ),
    "factors that sum to 0": (
        ("run", "--last", "2", "--shape", "0,1"),
        "--shape begins with 0, and coefficients sum to its first factor; expected a sum other than 0. Write the factors from the oldest "
        "checkpoint to the newest, as in [1, 0.5].",
    ),
    "factors of another number": (
        ("run", "--last", "3", "--shape", "1,0.5"),
        "--shape has 2 factors, and 3 models have this weight; expected one factor for each of them, the oldest first.",
    ),
    "a decay without ema": (
        ("run", "--decay", "0.5"),
        "--decay is 0.5, and shape is uniform; expected decay with shape ema alone. Leave it out, or write shape ema.",
    ),
    "a decay of 1": (
        ("run", "--shape", "ema", "--decay", "1"),
        "--decay is 1; expected a number above 0 and below 1.",
    ),
    "one list without a step": (
        ("run/checkpoint-1025", "run"),
        "run: has no step in its name; expected checkpoints such as checkpoint-500, step_500 or epoch=3-step=500.ckpt. List the models in "
        "their order, as in other merges.",
    ),
    "a model of the hub": (
        ("EleutherAI/pythia-70m",),
        "EleutherAI/pythia-70m: no such folder; expected that of a training run, with checkpoints such as checkpoint-500, step_500 or "
        "epoch=3-step=500.ckpt. Check the path. For a model of the hub, write EleutherAI/pythia-70m@step* and give steps: from, to, every.",
    ),
    "revisions without steps": (
        ("EleutherAI/pythia-70m@step*",),
        "EleutherAI/pythia-70m@step*: is a model of the hub with a step in place of *; expected steps (from, to, every), since revisions are "
        "not listed. Give steps.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_message(case: str, here: Path, run: Run) -> None:
    words, message = WRONG[case]
    code, out, err = run("average", *words, "out")
    assert (code, out, err) == (RecipeError.exit_code, "", f"alnico: {message}\n")
    assert not (here / "out").exists()


@pytest.mark.usefixtures("here")
def test_a_wrong_run_in_a_recipe_is_told_with_the_other_mistakes() -> None:
    with pytest.raises(RecipeError) as caught:
        alnico.load_recipe("merge_method: linear\ncheckpoints: {run: runs, lst: 3}\ndtype: bf61\nseed: x\n")
    assert [line.split(":")[1] for line in caught.value.args] == ["2", "3", "4"]
    with pytest.raises(RecipeError) as caught:
        alnico.load_recipe("merge_method: linear\ncheckpoints: {run: runs}\nseed: x\n")
    assert caught.value.args == (
        "recipe:2: checkpoints: runs: no such folder; expected that of a training run, with checkpoints such as checkpoint-500, step_500 or "
        "epoch=3-step=500.ckpt. Did you mean run?",
        "recipe:3: seed is 'x'; expected a whole number of at most 64 bits.",
    )
    with pytest.raises(RecipeError, match="models and checkpoints are both present"):
        alnico.load_recipe("merge_method: linear\nmodels: [a]\ncheckpoints: run\n")


@pytest.mark.usefixtures("here")
def test_a_search_takes_the_checkpoints_of_its_start(trained: Any) -> None:
    from alnico.tune.search.settings import read_search

    space, _ = read_search(
        "merge_method: linear\ncheckpoints: {run: run, last: 2}\nparameters: {weight: {search: [0.5, 1]}}\nsearch: {tasks: t.yml}\n"
    )
    assert space.references == tuple(f"run/checkpoint-{step}" for step in list(trained[1])[-2:])


FORMATS: dict[str, dict[str, bytes]] = {
    "pickles": {"pytorch_model.bin": zipped(pickled({"w": values((2, 3))})), "optimizer.pt": b"not read"},
    "ranks of FSDP": rank_files({"w": values((2, 3))}, {"w": values((2, 3))}),
    "partitions of DeepSpeed": partitions([values((3,))], [values((3,))], shapes=[{"w": (6,)}]),
    "a distributed checkpoint": {".metadata": metadata(*two_rows()[:2])} | two_rows()[2],
}


@pytest.mark.parametrize("kind", FORMATS)
def test_checkpoints_of_every_format_are_averaged(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their values are equal, and so is the mean; a half-written one of the same format lacks a file of these."""
    monkeypatch.chdir(tmp_path)
    for step in (8, 16, 24):
        put_files(Path("run", f"global_step{step}"), FORMATS[kind])
    result = alnico.average("run", "out", shape="cosine")
    assert [s.label for s in result.plan.models] == [f"run/global_step{step}" for step in (8, 16, 24)]
    assert not [note for note in result.plan.notes if "half-written" in note]
    with alnico.open_model("run/global_step8") as model, alnico.open_model("out") as averaged:
        np.testing.assert_array_equal(averaged.read("w"), model.read("w"))
