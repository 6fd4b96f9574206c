"""What mergekit 0.1.5 itself made of the same recipes and models (see README.md): alnico agrees, or the difference is a listed one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import alnico
from made import llama_config, read_file, read_model, save_model
from references.noise import uniform

HERE = Path(__file__).parent
TOLERANCE = 1e-5
"""Of the largest value of a tensor: the promise of docs/differences.md."""

MINUTE, SMALL = 2.0**-30, 2.0**-10
"""By how much the inputs called so are smaller (the small ones: their task vectors), as in make.py."""

Tensors = dict[str, np.ndarray]
Merge = Callable[[str], Tensors]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    for path in sorted((HERE / "inputs").glob("*.safetensors")):
        tensors = read_file(path)
        config = None
        if "model.embed_tokens.weight" in tensors:
            vocabulary, hidden = tensors["model.embed_tokens.weight"][1].shape
            config = llama_config(hidden, 1, vocabulary, tied=False, dtype="float32")
        save_model(root / path.stem, tensors, config)
    return root


@pytest.fixture
def merge(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merge:
    """Run alnico on a stored recipe, ``folder/name``."""
    monkeypatch.chdir(inputs)

    def run(case: str) -> Tensors:
        alnico.merge(HERE / f"{case}.yml", tmp_path / case.replace("/", "-"))
        return read_model(tmp_path / case.replace("/", "-"))

    return run


def theirs(case: str) -> Tensors:
    """What mergekit wrote."""
    return read_model(HERE / f"{case}.safetensors")


def deviation(found: Tensors, expected: Tensors, scale: float = 1.0) -> float:
    """The largest difference from ``scale * expected``, in units of a tensor's largest value; the worst tensor."""
    assert found.keys() == expected.keys()
    apart = []
    for name, value in expected.items():
        exact = value.astype(np.float64) * scale
        assert found[name].shape == exact.shape
        apart.append(np.abs(found[name] - exact).max() / np.abs(exact).max())
    return float(np.max(apart))  # NaN if one is


def change(tensors: Tensors, base: Tensors) -> Tensors:
    """What a merge added to the base."""
    return {n: v.astype(np.float64) - base[n] for n, v in tensors.items()}


def half_steps(found: Tensors, exact: Tensors) -> np.ndarray:
    """Every element's distance from ``exact``, in halves of a BF16 step: at most 1 where it is the nearest BF16 number."""
    halves = {n: 2.0 ** (np.floor(np.log2(np.abs(v.astype(np.float64)))) - 8) for n, v in exact.items()}
    return np.concatenate(
        [(np.abs(found[n].astype(np.float64) - v) / halves[n]).ravel() for n, v in exact.items()]
    )


def outcome(case: str) -> dict[str, str]:
    """The exceptions with which mergekit refused a case, by tensor ("" for the whole merge)."""
    return dict(json.loads((HERE / "outcomes.json").read_text()).get(case, {}))


@pytest.mark.parametrize("case", sorted(p.stem for p in (HERE / "parity").glob("*.yml")))
def test_a_recipe_gives_mergekits_result(case: str, merge: Merge) -> None:
    found, expected = merge(f"parity/{case}"), theirs(f"parity/{case}")
    worst = deviation(found, expected)
    assert worst <= TOLERANCE
    assert {v.dtype for v in found.values()} == {v.dtype for v in expected.values()}


@pytest.mark.parametrize(
    ("case", "theirs_at_least"),
    [
        ("slerp", 0.3), ("nuslerp", 0.3), ("multislerp", 0.05), ("karcher", 1.0), ("dare_linear", 0.5), ("ties-rescale", 0.4),
        ("model_stock", 0.2), ("sce-0.5", 0.1), ("nearswap", 0.08),
    ],
)  # fmt: skip
def test_inputs_of_any_size_give_a_result_of_that_size(
    case: str, theirs_at_least: float, merge: Merge
) -> None:
    """All inputs times 2**-30 give the result times 2**-30; epsilons that are absolute prevent it in mergekit."""
    expected = theirs(f"parity/{case}")
    assert deviation(theirs(f"evidence/minute-{case}"), expected, MINUTE) >= theirs_at_least
    assert deviation(merge(f"evidence/minute-{case}"), expected, MINUTE) <= TOLERANCE


@pytest.mark.parametrize(("case", "theirs_at_least"), [("model_stock", 0.9), ("sce-1", 0.3)])
def test_small_task_vectors_give_a_small_change(
    case: str, theirs_at_least: float, merge: Merge, inputs: Path
) -> None:
    """Task vectors of about 1e-4, as fine-tunes have them, give 2**-10 of the change of those of about 0.1."""
    expected = change(theirs(f"parity/{case}"), read_model(inputs / "base"))
    base = read_model(inputs / "small-base")
    assert deviation(change(theirs(f"evidence/small-{case}"), base), expected, SMALL) >= theirs_at_least
    # The inputs themselves are rounded to float32 beside a base of about 1: 3e-4 of the task vectors.
    assert deviation(change(merge(f"evidence/small-{case}"), base), expected, SMALL) <= 3e-3


@pytest.mark.parametrize("case", ["task_arithmetic", "ties", "linear", "multislerp"])
def test_a_merge_in_bf16_is_the_exact_one_rounded_once(case: str, merge: Merge) -> None:
    exact = theirs(f"evidence/bf16-{case}-float64")
    # An exact middle of two BF16 numbers may go either way, by what float32 makes of it.
    assert half_steps(merge(f"evidence/bf16-{case}"), exact).max() <= 1.001
    wrong = float((half_steps(theirs(f"evidence/bf16-{case}"), exact) > 1.001).mean())
    assert wrong == 0 if case == "linear" else wrong >= 0.25, (
        "mergekit's share of elements that are not the nearest"
    )


def test_arcee_fusion_takes_what_is_important_and_not_what_rounding_makes_so(
    merge: Merge, inputs: Path
) -> None:
    """Task vectors of 1e-4: their divergence is some 1e-9, below what float32 tells of probabilities."""
    exact, base = theirs("evidence/small-arcee_fusion-float64"), read_model(inputs / "small-base")
    in_float32 = theirs("evidence/small-arcee_fusion")

    def taken(tensors: Tensors) -> np.ndarray:
        return np.concatenate([np.abs(tensors[n] - base[n].astype(np.float64)).ravel() > 1e-9 for n in base])

    assert (taken(in_float32) != taken(exact)).mean() >= 0.1
    assert deviation(merge("evidence/small-arcee_fusion"), exact) <= TOLERANCE
    assert np.array_equal(taken(merge("evidence/small-arcee_fusion-float64")), taken(exact))


def test_ramplus_tl_writes_the_dtype_that_is_asked_for(merge: Merge) -> None:
    dtypes = {dtype for dtype, _ in read_file(HERE / "evidence" / "bf16-ramplus_tl.safetensors").values()}
    assert dtypes == {"F32"}
    exact, found = theirs("evidence/bf16-ramplus_tl"), merge("evidence/bf16-ramplus_tl")
    assert all((v.view(np.uint32) & 0xFFFF == 0).all() for v in found.values())
    assert deviation(found, exact) <= 2.0**-8


def test_a_dtype_rounds_the_output_and_not_the_inputs(merge: Merge) -> None:
    exact = theirs("parity/linear-weights")
    assert half_steps(merge("evidence/rounded-linear"), exact).max() <= 1.001
    assert (half_steps(theirs("evidence/rounded-linear"), exact) > 1.001).mean() >= 0.25


def test_sums_of_fp16_task_vectors_do_not_overflow(merge: Merge) -> None:
    exact = theirs("evidence/big-ties-float64")
    assert sum(np.isnan(v).any() for v in theirs("evidence/big-ties-float16").values()) >= 5
    assert deviation(merge("evidence/big-ties-float16"), exact) <= 2.0**-11


@pytest.mark.parametrize("case", ["linear", "karcher"])
def test_a_base_model_that_is_not_listed_is_not_averaged_in(case: str, merge: Merge) -> None:
    expected = theirs(f"parity/{case}")
    assert deviation(theirs(f"evidence/donor-{case}"), expected) >= 0.09
    assert deviation(merge(f"evidence/donor-{case}"), expected) <= TOLERANCE


def test_a_base_model_that_is_not_listed_needs_no_weight(merge: Merge) -> None:
    assert outcome("donor-linear-own") == {"": "RuntimeError"}
    assert deviation(merge("evidence/donor-linear-own"), theirs("parity/linear")) <= TOLERANCE


def test_multislerp_of_one_model_follows_the_formula(merge: Merge, inputs: Path) -> None:
    base, one = read_model(inputs / "base"), read_model(inputs / "one")
    assert deviation(theirs("evidence/one-multislerp"), one) == 0
    assert (
        deviation(
            merge("evidence/one-multislerp"), {n: (base[n] + one[n].astype(np.float64)) / 2 for n in base}
        )
        <= TOLERANCE
    )


def test_multislerp_of_directions_that_cancel_is_their_weighted_sum(merge: Merge) -> None:
    """A model, its opposite, and a third of weight 0."""
    assert outcome("cancel-multislerp") == {"": "ValueError"}
    assert not any(v.any() for v in merge("evidence/cancel-multislerp").values())


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_the_way_to_a_tensor_of_zeros_is_straight(method: str, merge: Merge, inputs: Path) -> None:
    base = read_model(inputs / "base")
    assert deviation(theirs(f"evidence/length-0-{method}"), base, 0.5**0.5) <= TOLERANCE
    assert deviation(merge(f"evidence/length-0-{method}"), base, 0.5) <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("density-0", "density is 0; density is the share"),
        ("density-2", "density is 2; density is the share"),
        ("below-nearswap", "t is -0.1; t is the largest step"),
    ],
)
def test_a_number_outside_its_range_is_refused(case: str, told: str, merge: Merge, inputs: Path) -> None:
    meant = theirs("parity/ties-whole") if case == "density-2" else read_model(inputs / "base")
    assert deviation(theirs(f"evidence/{case}"), meant) == 0
    with pytest.raises(alnico.errors.RecipeError, match=told):
        merge(f"evidence/{case}")


def test_weights_that_sum_to_0_are_refused(merge: Merge) -> None:
    assert not any(np.isfinite(v).all() for v in theirs("evidence/zero-sum").values())
    with pytest.raises(alnico.errors.RecipeError, match=r"the weights of linear sum to 0 \(1, -1\)"):
        merge("evidence/zero-sum")


def test_weights_that_sum_to_0_are_not_left_undivided_in_silence(merge: Merge, inputs: Path) -> None:
    base, one, two = (read_model(inputs / m) for m in ("base", "one", "two"))
    assert (
        deviation(theirs("evidence/zero-sum-task_arithmetic"), {n: base[n] + one[n] - two[n] for n in base})
        <= TOLERANCE
    )
    with pytest.raises(alnico.errors.AlnicoError, match=r"the weights .*sum to 0 \(1, -1\)"):
        merge("evidence/zero-sum-task_arithmetic")


def test_unknown_keys_are_refused(merge: Merge) -> None:
    assert deviation(theirs("evidence/unknown-key"), theirs("parity/ties-whole")) == 0
    with pytest.raises(
        alnico.errors.RecipeError, match=r"Did you mean density\?\n.*Did you mean parameters\?"
    ):
        merge("evidence/unknown-key")


def test_a_weight_left_out_is_1(merge: Merge) -> None:
    assert outcome("no-weight") == {"": "RuntimeError"}
    assert deviation(merge("evidence/no-weight"), theirs("parity/ties")) <= TOLERANCE


def test_entries_equal_to_the_threshold_are_all_kept(merge: Merge) -> None:
    """Every entry of the task vector is 1, and half of them are to be kept."""
    assert {float(v.mean()) for v in theirs("evidence/equal-ties").values()} == {0.5}
    assert {float(v.mean()) for v in merge("evidence/equal-ties").values()} == {1.0}


def test_breadcrumbs_keep_an_entry_of_every_tensor(merge: Merge, inputs: Path) -> None:
    """Of 8 entries a density of 0.05 is less than one."""
    base, norms = read_model(inputs / "base"), ("model.norm.weight", "model.layers.0.input_layernorm.weight")
    assert [int((theirs("evidence/few-breadcrumbs")[n] != base[n]).sum()) for n in norms] == [0, 0]
    found = merge("evidence/few-breadcrumbs")
    assert [int((found[n] != base[n]).sum()) for n in norms] == [1, 1]


def ranked(delta: np.ndarray, tensor: str, axis: int) -> np.ndarray:
    """DELLA at density 0.5 and epsilon 0.15 on one model: ranks along ``axis``, equal magnitudes share theirs; L1 rescale."""
    size, length = np.abs(delta), delta.shape[axis]
    lines = np.moveaxis(size, axis, -1)
    own, other = lines[..., :, None], lines[..., None, :]
    places = (other < own).sum(-1) + ((other == own).sum(-1) - 1) / 2
    rank = np.moveaxis(places / (length - 1) if length > 1 else places + 0.5, -1, axis)
    kept = np.where(uniform(0, tensor, 0, delta.shape) < 0.35 + 0.3 * rank, delta, 0.0)
    return kept * (size.sum() / np.abs(kept).sum()) if kept.any() else kept


def test_della_ranks_equal_magnitudes_alike(merge: Merge) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    expected = {name: ranked(np.ones((4, 8)), name, 1)}
    assert deviation({name: theirs("evidence/equal-della_linear")[name]}, expected) > 0.5
    assert deviation({name: merge("evidence/equal-della_linear")[name]}, expected) <= TOLERANCE


def test_della_ranks_the_last_dimension_and_takes_rows_of_one(merge: Merge, inputs: Path) -> None:
    """mergekit ranks a tensor of three dimensions along its second, and draws NaN for rows of one element."""
    base, one = (read_model(inputs / m) for m in ("loose-base", "loose-one"))
    delta = {n: one[n].astype(np.float64) - base[n] for n in base}
    assert outcome("loose-della_linear") == {"column": "RuntimeError", "one": "RuntimeError"}
    second = {"cube": base["cube"] + ranked(delta["cube"], "cube", 1)}
    last = {n: base[n] + ranked(delta[n], n, delta[n].ndim - 1) for n in base}
    assert deviation(theirs("evidence/loose-della_linear"), second) <= TOLERANCE
    assert deviation(second, {"cube": last["cube"]}) > 0.1
    assert deviation(merge("evidence/loose-della_linear"), last) <= TOLERANCE


def test_every_difference_names_tests_that_exist() -> None:
    root = HERE.parent
    page, _, listed = (root.parent / "docs" / "differences.md").read_text().partition("\n## Tests\n")
    rows = re.findall(r"^\| (?!what \||--- )(.+?) \| ", page, flags=re.MULTILINE)
    tests = dict(re.findall(r"^- (.+): (`test_[^:]+\.py.*)$", listed, flags=re.MULTILINE))
    assert len(rows) > 40
    assert rows == list(tests)
    for what, names in tests.items():
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", names)
        assert named, what
        for file, test in named:
            (path,) = root.rglob(file)
            assert not test or f"def {test}(" in path.read_text(), f"{file} has no {test}"
