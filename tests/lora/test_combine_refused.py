"""What combining refuses: one clear message each, and nothing left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import made
from alnico.errors import (
    AlnicoError,
    MethodError,
    MismatchError,
    ModelError,
    NonFiniteError,
    OutputError,
    RecipeError,
    ResourceError,
)
from alnico.lora.combine import combine
from alnico.lora.combine_options import check_options
from lora.made_adapters import factors, linear, save
from lora.references.combined import deltas

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    linear(Path("a"), seed=1)
    linear(Path("b"), seed=2)


def refusal(kind: type[AlnicoError], adapters=("a", "b"), **asked) -> str:
    before = sorted(str(p) for p in Path().rglob("*"))
    with pytest.raises(kind) as caught:
        combine(adapters, "out", **asked)
    assert sorted(str(p) for p in Path().rglob("*")) == before
    return str(caught.value)


def change(adapter: str, **config) -> None:
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_adapters_of_different_bases() -> None:
    change("a", base_model_name_or_path="owner/one")
    change("b", base_model_name_or_path="/models/two")
    assert refusal(MismatchError) == (
        "a was trained on owner/one, b on /models/two; expected adapters of one base, because an update has no meaning for another base. Use "
        "adapters of one base, or set unrelated: allow (--unrelated allow) if the base has several names."
    )
    assert combine(["a", "b"], "out", unrelated="allow").notes[1] == (
        "a was trained on owner/one, b on /models/two; combined anyway."
    )


def test_names_of_a_base_agree_by_their_last_part() -> None:
    change("a", base_model_name_or_path="owner/one")
    change("b", base_model_name_or_path="/models/One/")
    combine(["a", "b"], "out")


def test_shapes_that_differ() -> None:
    linear(Path("c"), rows=31)
    assert refusal(MismatchError, ["a", "c"]) == (
        "m.o: a changes a linear layer of (20, 30), c a linear layer of (20, 31); expected the same parameter in both. "
        "Combine adapters of one base."
    )


def test_dora() -> None:
    tensors = factors("m.q", 30, 20, 3, 0) | {"m.q.lora_magnitude_vector": np.ones(30, np.float32)}
    save(Path("c"), tensors, r=3, lora_alpha=3, use_dora=True)
    assert refusal(ModelError, ["a", "c"]) == (
        "c: m.q has DoRA magnitudes, which rescale the whole weight, so its update is not known without the base. Merge it "
        "with a recipe instead, as BASE+ADAPTER, with the base as base_model (for example task_arithmetic); `alnico lora extract` "
        "turns the result into an adapter."
    )


def test_modules_to_save_without_the_base() -> None:
    for name in "cd":
        tensors = factors("m.q", 6, 5, 2, 0) | {"score.weight": np.ones((3, 4), np.float32)}
        save(Path(name), tensors, r=2, lora_alpha=2, modules_to_save=["score"])
    assert refusal(MismatchError, ["c", "d"]) == (
        "score.weight: c and d store it whole (modules_to_save or a trained bias), with weights 1, 1; expected weights that sum to 1, as its "
        "change is unknown without the base. Choose such weights, or set saved: average (--saved average) for the weighted "
        "mean, or saved: drop to leave it out; or merge BASE+ADAPTER with a recipe."
    )
    assert refusal(MismatchError, ["c", "d"], method="ties", weights=[0.5, 0.5]) == (
        "score.weight: c and d store it whole (modules_to_save or a trained bias), and ties needs the change to it, as its change "
        "is unknown without the base. Set saved: average (--saved average) for the weighted mean, or saved: drop to leave it "
        "out; or merge BASE+ADAPTER with a recipe."
    )
    assert refusal(MethodError, ["c", "d"], weights=[1, -1], saved="average") == (
        "score.weight: the weights of c and d sum to 0, so there is no mean; expected another sum. Change a weight, or set saved: drop "
        "(--saved drop)."
    )


def test_whole_tensors_that_no_one_trained_and_that_differ() -> None:
    for i, name in enumerate("cd"):
        save(Path(name), factors("m.q", 6, 5, 1, 0) | {"lm_head.weight": np.full((3, 4), i, np.float32)})
    assert refusal(MismatchError, ["c", "d"]) == (
        "lm_head.weight: c and d store different values, and neither trained it; expected the base's values. Combine adapters of one base with one "
        "vocabulary."
    )


def test_whole_tensors_of_unequal_shapes() -> None:
    for i, name in enumerate("cd"):
        tensors = factors("m.q", 6, 5, 1, 0) | {"lm_head.weight": np.ones((3 + i, 4), np.float32)}
        save(Path(name), tensors, modules_to_save=["lm_head"])
    assert refusal(MismatchError, ["c", "d"]) == (
        "lm_head.weight: c has (3, 4), d (4, 4); expected one shape. Combine adapters of one base with one vocabulary, or drop such tensors "
        "with saved: drop (--saved drop)."
    )
    combine(["c", "d"], "out", saved="drop")


def test_embeddings_and_lora_biases_together() -> None:
    save(
        Path("c"),
        {
            "e.lora_embedding_A": np.ones((1, 4), np.float32),
            "e.lora_embedding_B": np.ones((3, 1), np.float32),
        },
    )
    save(Path("d"), factors("m.q", 6, 5, 1, 0) | {"m.q.lora_B.bias": np.ones(6, np.float32)}, lora_bias=True)
    assert refusal(MismatchError, ["c", "d"]) == (
        "e: an adapter changes this embedding, and d has lora_bias, which PEFT does not support for embeddings; expected one of the two, as no "
        "config can have both. Leave one adapter out."
    )


def test_experts_of_unequal_parameters() -> None:
    for name, targets in (("c", ["experts.up"]), ("d", ["experts.up", "experts.down"])):
        tensors = {
            "m.experts.lora_A.weight": np.ones((4, 6), np.float32),
            "m.experts.lora_B.weight": np.ones((7, 4), np.float32),
        }
        save(Path(name), tensors, r=2, target_parameters=targets)
    assert refusal(MismatchError, ["c", "d"]) == (
        "d: target_parameters is ['experts.down', 'experts.up'], but ['experts.up'] in c; expected the same list, as PEFT does. Combine adapters of the "
        "same parameters."
    )


@pytest.mark.parametrize("method", ["svd", "cat", "ties", "tsv"])
def test_numbers_that_are_not_finite(method) -> None:
    tensors = factors("m.q", 30, 20, 3, 0)
    tensors["m.q.lora_B.weight"][3, 1] = np.nan
    save(Path("c"), tensors, r=3, lora_alpha=3)
    assert refusal(NonFiniteError, ["a", "c"], method=method) == (
        "c: base_model.model.m.q.lora_B.weight[3, 1] has NaN; expected finite numbers. Fix this adapter or leave it out."
    )


def test_results_too_large_for_the_dtype() -> None:
    assert refusal(NonFiniteError, weights=[1e9, 1], dtype="float16") == (
        "base_model.model.m.o.lora_A.weight: holds a NaN, an infinity or a number too large for F16; expected finite numbers. Check the "
        "inputs, or choose a wider dtype."
    )


def test_what_is_no_adapter() -> None:
    Path("c").mkdir()
    assert refusal(ModelError, ["a", "c"]) == (
        "c: has no adapter_config.json, expected a LoRA adapter as PEFT saves it. Check the path."
    )
    save(Path("d"), {"score.weight": np.ones((3, 4), np.float32)}, modules_to_save=["score"])
    assert (
        refusal(ModelError, ["d"])
        == "d: has no LoRA update; expected at least one. Merge whole modules with a recipe."
    )
    file = Path("a") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert refusal(ModelError).startswith(f"{file.resolve()}") or refusal(ModelError).startswith(
        "a/adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rank": 0}, "rank is 0; expected a whole number of 1 or more."),
        ({"energy": 1.5}, "energy is 1.5; expected a share in (0, 1]. Choose 0.9, for example."),
        ({"method": "cat", "rank": 3}, "cat keeps all ranks, but rank is set; expected neither rank nor energy. Remove it, or choose svd, which cuts the same sum to a rank."),
        ({"method": "cat", "energy": 0.5}, "cat keeps all ranks, but energy is set; expected neither rank nor energy. Remove it, or choose svd, which cuts the same sum to a rank."),
        ({"method": "cat", "density": 0.5}, "cat has no option 'density'; it has none."),
        ({"weights": [1]}, "weights has 1 values for 2 adapters; expected one for each."),
        ({"weights": [1, float("nan")]}, "a weight is nan; expected a finite number."),
        ({"weight": 1}, "weight is not an option here; give weights, one number per adapter."),
        ({"method": "ties", "density": 2}, "ties.density is 2; density is the share of each tensor's entries that is kept, in (0, 1]."),
        ({"method": "ties", "dnsity": 0.5}, "ties has no option 'dnsity'; it has density, weight, scale, elect, tie, divide, rescale, scope. Did you mean density?"),
        ({"method": "ties", "density": [0.5, 0.5, 0.5]}, "ties.density has 3 values for 2 models; expected one for each."),
        ({"method": "ties", "space": "cores"}, "space is 'cores'; expected one of dense, core, knots."),
        ({"method": "svd", "space": "core"}, "svd takes no space (found core): it works on the factors, and a sum is the same in every space. Remove it."),
        ({"method": "tsv", "space": "dense"}, "tsv always works in the core space of the adapters (found dense). Remove the space."),
        ({"method": "tsv", "least": 2}, "tsv.least is 2; least is directions with a smaller singular value in the stacked vectors are left out, in [0, 1]."),
        ({"method": "iso_c", "least": 0.1}, "iso_c has no option 'least'; it has weight, scale, calibrate, others, others_scale, embeddings."),
        ({"method": "tsv", "others": "ties"}, "tsv.others is 'ties'; expected mean, sum or base: of an adapter it is for biases alone. Choose one of these."),
        ({"method": "tsv", "embeddings": "others"}, "tsv.embeddings is 'others'; expected matrix: what an adapter adds to an embedding is a matrix. Remove the option."),
        ({"method": "sce", "weights": [1, 2]}, "sce has no option 'weight'; it has select_topk."),
        ({"method": "dare_linear", "majority_sign_method": "total"}, "dare_linear does not elect signs (majority_sign_method is 'total'). Remove the option, or choose ties or dare_ties."),
        ({"method": "ties", "majority_sign_method": "sum"}, "majority_sign_method is 'sum'; expected one of total, frequency (elect: mass, count)."),
        ({"saved": "mean"}, "saved is 'mean'; expected one of error, average, drop. Choose one."),
        ({"unrelated": "yes"}, "unrelated is 'yes'; expected one of error, allow. Choose one."),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of bfloat16, float16, float32, float64. Choose one."),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_wishes(asked, message) -> None:
    assert refusal(MethodError, **asked) == message


def test_unknown_methods_answer_with_the_nearest() -> None:
    said = refusal(MethodError, method="tise")
    assert said.startswith(
        "method is 'tise'; expected one of cat, svd, linear, task_arithmetic, breadcrumbs, "
    )
    assert said.endswith(" Did you mean ties?")
    assert refusal(MethodError, method="karcher").endswith(" It merges weights, not updates.")


def test_no_adapters() -> None:
    for adapters in ([], "a"):
        assert (
            refusal(RecipeError, adapters) == "adapters: expected a list with at least one adapter. Give one."
        )


def test_places_that_are_taken() -> None:
    Path("full").mkdir()
    (Path("full") / "file").touch()
    with pytest.raises(OutputError, match="full: exists and is not empty"):
        combine(["a", "b"], "full")
    with pytest.raises(OutputError, match="a: is one of the inputs or contains it"):
        combine(["a", "b"], "a", overwrite=True)
    with pytest.raises(OutputError, match="expected a directory, for the adapter"):
        combine(["a", "b"], "out.safetensors")
    with pytest.raises(OutputError, match="full: holds file, not part of a model"):
        combine(["a", "b"], "full", overwrite=True)
    combine(["a", "b"], "full", overwrite_anything=True)
    assert not (Path("full") / "file").exists()
    combine(["a", "b"], "full", overwrite=True)
    with pytest.raises(OutputError, match="is the working directory"):
        combine(["a", "b"], ".", overwrite_anything=True)


def test_a_budget_that_is_too_small() -> None:
    said = refusal(ResourceError, memory="300MiB")
    assert re.fullmatch(
        r"m\.o\.weight: combining its 2 updates needs 379\.\d MB of memory, the budget is 314\.6 MB\. Raise --memory to 363MiB\.",
        said,
    )


def test_an_interrupt_leaves_nothing() -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        combine(["a", "b"], "out", method="ties", watch=interrupt)
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b"]


# The command.


def test_the_command_combines(run: Run) -> None:
    code, stdout, stderr = run(
        "lora", "combine", "a", "b", "out", "--weights=0.5,-0.25", "--method", "svd", "--rank", "4"
    )
    assert code == 0
    assert stderr.splitlines() == [
        "note: svd: the scale of each adapter (alpha / r) is applied once, as in PEFT 0.21 and later; PEFT 0.20 applied it twice."
    ]
    assert re.fullmatch(
        r"out: 2 updates of rank 4, error [\d.]+ %, [\d.]+ kB in [\d.]+ s\nlargest error: [\d.]+ %, m\.[qo]\n"
        r"error: what the rank drops, relative to the norm of the method's result\.\n",
        stdout,
    )
    expected = 0.5 * deltas(Path("a"))["m.q"] - 0.25 * deltas(Path("b"))["m.q"]
    found = deltas(Path("out"))["m.q"]
    assert np.linalg.norm(found - expected) < 0.5 * np.linalg.norm(expected)


def test_the_command_reads_options_as_a_recipe_does(run: Run) -> None:
    words = [
        "lora",
        "combine",
        "a",
        "b",
        "out",
        "--method",
        "ties",
        "--set",
        "density=[0.5, 0.25]",
        "--set",
        "divide=count",
    ]
    code, stdout, stderr = run(*words, "--majority-sign-method", "total", "--json", "--seed", "3")
    assert (code, stderr) == (0, "")
    data = json.loads(stdout)
    assert [m["rank"] for m in data["modules"]] == [6, 6]
    assert data["modules"][0].keys() == {"module", "rank", "error"}
    lock = json.loads((Path("out") / "alnico.lock.json").read_text())
    assert lock["options"]["options"] == {
        "density": [0.5, 0.25],
        "divide": "count",
        "elect": "mass",
        "weight": [1.0, 1.0],
    }
    assert lock["seed"] == 3
    combine(["a", "b"], "again", method="ties", density=[0.5, 0.25], divide="count", elect="mass", seed=3)
    assert made.model_bytes(Path("out")) == made.model_bytes(Path("again"))


def test_the_command_says_every_update_if_asked_and_nothing_if_not(run: Run) -> None:
    assert run("lora", "combine", "a", "b", "out", "--quiet") == (0, "", "")
    code, stdout, _ = run("lora", "combine", "a", "b", "out", "--overwrite", "--method", "cat", "-v")
    assert (code, stdout.splitlines()[:2]) == (0, ["m.o  rank 6  error 0 %", "m.q  rank 6  error 0 %"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a"], 2, "Missing argument 'ADAPTER'."),
        (
            ["a", "b", "out", "--set", "density"],
            2,
            "--set: 'density' is not an option; expected NAME=VALUE, such as density=0.5.",
        ),
        (
            ["a", "b", "out", "--weights", "x"],
            2,
            "--weights: 'x' is not a list of numbers. Write them as 0.7,0.3.",
        ),
        (
            ["a", "b", "out", "--set", "density=0.5"],
            3,
            "linear has no option 'density'; it has weight, normalize.",
        ),
        (["a", "c", "out"], 4, "c: is not a directory; expected that of a LoRA adapter"),
        (["a", "b", "a"], 8, "a: is one of the inputs or contains it"),
    ],
    ids=str,
)
def test_the_command_exits_with_the_code_of_its_error(run: Run, words, code, message) -> None:
    found, stdout, stderr = run("lora", "combine", *words)
    assert (found, stdout) == (code, "")
    assert message in " ".join(stderr.replace("│", " ").split())
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b"]


def test_pefts_vote_by_number_elects_plus_on_a_tie() -> None:
    assert (
        check_options("ties_svd", 2, None, None, {"majority_sign_method": "frequency"}).options["tie"]
        == "plus"
    )
    assert "tie" not in check_options("ties_svd", 2, None, None, {"majority_sign_method": "total"}).options
