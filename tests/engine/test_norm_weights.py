"""Weights that follow from norms: measured in the run, the same for any way to run it, and those one would have put in by hand."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.errors import MethodError, MismatchError, ModelError, NonFiniteError, OutputError
from alnico.events import Event, Measuring
from alnico.kernels.constants import LEAF
from alnico.numerics.norm_weights import norm_weights
from analysis.reference import reference_analysis
from made import model_bytes, read_model, save_file, save_model

NAMES = ("embed.weight", "layers.0.w", "layers.1.w", "norm.weight")
ISSUE = [182.63449804, 31.87331430, 0.0, 0.52867741, 9.26351817]


def made(seed: int = 0) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A base and two models that differ in size from tensor to tensor; layer 1 is frozen in both."""
    random = np.random.default_rng(seed)
    shapes = {"embed.weight": (40, 7), "layers.0.w": (33, 5), "layers.1.w": (33, 5), "norm.weight": (12,)}
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    sizes = [
        {"embed.weight": 0.1, "layers.0.w": 0.3, "norm.weight": 0.2},
        {"embed.weight": 0.5, "layers.0.w": 0.1, "norm.weight": 0.4},
    ]
    tuned = [
        {
            n: (v + size.get(n, 0.0) * random.standard_normal(v.shape)).astype(np.float32)
            for n, v in base.items()
        }
        for size in sizes
    ]
    return base, tuned


def saved(root: Path, dtype: str = "F32") -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    base, tuned = made()
    for name, model in zip(("base", "a", "b"), (base, *tuned), strict=True):
        save_model(root / name, {n: (dtype, v) for n, v in model.items()})
    return base, tuned


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(method: str = "task_arithmetic", weight: Any = None, **parameters: Any) -> dict[str, Any]:
    weight = {"from": "l2_norm"} if weight is None else weight
    return {
        "merge_method": method,
        "base_model": "base",
        "models": ["a", "b"],
        "parameters": {"weight": weight, **parameters},
        "unrelated": "allow",
    }


def norm(base: dict[str, np.ndarray], model: dict[str, np.ndarray], names: tuple[str, ...] = NAMES) -> float:
    """In float64, without the code under test."""
    return float(
        np.sqrt(sum(((model[n].astype(np.float64) - base[n].astype(np.float64)) ** 2).sum() for n in names))
    )


def by_hand(mode: str, norms: list[float], **given: float) -> list[float]:
    """The issue's formulas."""
    values = np.array(norms)
    beta, alpha = given.get("beta", 1.0), given.get("alpha", 1.5)
    w = {
        "linear": lambda: 1 / values,
        "power": lambda: values**-alpha,
        "exp": lambda: np.exp(-beta * values / values.mean()),
    }[mode]()
    return list(given.get("scale", 1.0) * w / w.sum())


def merged_bytes(folder: Path) -> bytes:
    """The weights of an output; its lock has the recipe, too."""
    return (folder / "model.safetensors").read_bytes()


# ---- the formulas -----------------------------------------------------------------------------------------------------


def test_the_known_answer() -> None:
    assert [round(w, 6) for w in norm_weights(ISSUE)] == [0.005153, 0.148450, 0.302100, 0.298560, 0.245736]


@pytest.mark.parametrize(
    ("mode", "given"), [("linear", {}), ("power", {"alpha": 0.5}), ("exp", {"beta": 3.0, "scale": -2.0})]
)
def test_each_mode_is_its_formula(mode: Any, given: dict[str, float]) -> None:
    norms = [0.5, 2.0, 7.0]
    assert np.allclose(
        norm_weights(norms, mode=mode, **given), by_hand(mode, norms, **given), rtol=1e-14, atol=0
    )


def test_a_large_beta_leaves_the_nearest_model_alone() -> None:
    assert norm_weights([3.0, 2.0], beta=1e6) == (0.0, 1.0)


@pytest.mark.parametrize("mode", ["linear", "power"])
def test_a_norm_of_0_is_refused_where_it_divides(mode: Any) -> None:
    with pytest.raises(
        MethodError, match=rf"^norms\[1\] is 0, by which mode {mode} divides; expected models that differ"
    ):
        norm_weights([1.0, 0.0], mode=mode)


@pytest.mark.parametrize("given", [{"beta": -1.0}, {"alpha": 0.0}, {"scale": math.inf}, {"mode": "cubic"}])
def test_numbers_outside_their_range_are_refused(given: Any) -> None:
    with pytest.raises(MethodError, match="expected"):
        norm_weights([1.0, 2.0], **given)


# ---- what the engine measures -----------------------------------------------------------------------------------------

METHODS = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5, "scale": 1.5},
    "dare_ties": {"density": 0.5},
    "nuslerp": {},
}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_merge_has_the_bits_of_the_weights_put_in_by_hand(method: str, tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    result = alnico.merge(recipe(method, **METHODS[method]), tmp_path / "out")
    (weighing,) = result.plan.norm_weight_groups
    assert weighing.norms is not None
    assert weighing.weights is not None
    assert np.allclose(weighing.norms, [norm(base, m) for m in tuned], rtol=1e-14, atol=0)
    assert np.allclose(weighing.weights, by_hand("exp", [norm(base, m) for m in tuned]), rtol=1e-13, atol=0)
    same = recipe(method, None, **METHODS[method]) | {
        "models": [
            {"model": m, "parameters": {"weight": w}} for m, w in zip("ab", weighing.weights, strict=True)
        ]
    }
    alnico.merge(same, tmp_path / "by_hand")
    assert merged_bytes(tmp_path / "out") == merged_bytes(tmp_path / "by_hand")


@pytest.mark.parametrize(
    ("per", "groups"),
    [
        (
            "layer",
            {
                "in no layer": ("embed.weight", "norm.weight"),
                "layers.0": ("layers.0.w",),
                "layers.1": ("layers.1.w",),
            },
        ),
        ("tensor", {name: (name,) for name in NAMES}),
    ],
)
def test_norms_by_layer_and_by_tensor(per: str, groups: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    setting = {"from": "l2_norm", "mode": "power", "alpha": 2, "per": per, "scale": 0.5}
    result = alnico.merge(recipe(weight=setting), tmp_path / "out")
    assert {w.place: tuple(w.tensors) for w in result.plan.norm_weight_groups} == groups
    out = read_model(tmp_path / "out")
    for place, names in groups.items():
        norms = [norm(base, m, names) for m in tuned]
        weights = (
            [0.25, 0.25] if place.startswith("layers.1") else by_hand("power", norms, alpha=2, scale=0.5)
        )
        for name in names:
            expected = base[name] + sum(
                w * (m[name].astype(np.float64) - base[name]) for w, m in zip(weights, tuned, strict=True)
            )
            assert np.allclose(out[name], expected, rtol=0, atol=1e-6)
    assert out["layers.1.w"].tobytes() == base["layers.1.w"].tobytes()


def test_a_setting_under_a_filter_is_measured_over_the_tensors_it_fits(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    weight = [
        {"filter": "layers", "value": {"from": "l2_norm", "mode": "linear"}},
        {"filter": "norm", "value": 0.25},
        {"from": "l2_norm"},
    ]
    plan = alnico.merge(recipe(weight=weight), tmp_path / "out").plan
    assert [tuple(w.tensors) for w in plan.norm_weight_groups] == [
        ("embed.weight",),
        ("layers.0.w", "layers.1.w"),
    ]
    assert plan.norm_weight_groups[1].norms == pytest.approx(
        [norm(base, m, ("layers.0.w", "layers.1.w")) for m in tuned], rel=1e-14
    )


def test_rules_of_other_methods_share_the_norms_of_the_whole_model(tmp_path: Path) -> None:
    saved(tmp_path)
    given = recipe() | {"methods": [{"filter": "layers", "merge_method": "linear"}]}
    (weighing,) = alnico.plan(given).norm_weight_groups
    assert tuple(weighing.tensors) == NAMES


def test_a_model_with_a_number_keeps_it_and_the_others_are_weighed(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    save_model(tmp_path / "c", {n: ("F32", v + 1) for n, v in base.items()})
    given = recipe() | {"models": ["a", {"model": "c", "parameters": {"weight": -0.5}}, "b"]}
    (weighing,) = alnico.merge(given, tmp_path / "out").plan.norm_weight_groups
    assert weighing.weights is not None
    w = weighing.weights
    alnico.merge(
        recipe()
        | {
            "models": [
                {"model": m, "parameters": {"weight": x}} for m, x in (("a", w[0]), ("c", -0.5), ("b", w[1]))
            ]
        },
        tmp_path / "by_hand",
    )
    assert weighing.norms == pytest.approx([norm(base, m) for m in tuned], rel=1e-14)
    assert merged_bytes(tmp_path / "out") == merged_bytes(tmp_path / "by_hand")


def test_weights_that_come_to_0_and_1_give_the_copy_that_they_give_by_hand(tmp_path: Path) -> None:
    saved(tmp_path)
    result = alnico.merge(recipe("linear", {"from": "l2_norm", "beta": 1e9}), tmp_path / "out")
    assert {job.kind for job in result.plan.jobs} == {"copy"}
    assert merged_bytes(tmp_path / "out") == merged_bytes(tmp_path / "a")


def test_threads_blocks_and_budget_change_no_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    base = {
        "w": random.standard_normal((3 * LEAF + 100, 6)).astype(np.float32),
        "v": random.standard_normal(50).astype(np.float32),
    }
    for name, size in (("base", 0.0), ("a", 0.1), ("b", 0.3)):
        save_model(
            tmp_path / name,
            {n: ("F32", v + np.float32(size) * random.random(v.shape, np.float32)) for n, v in base.items()},
        )
    results = [
        alnico.merge(recipe(), tmp_path / str(i), threads=threads, memory=memory)
        for i, (threads, memory) in enumerate([(1, "2GiB"), (3, "2GiB"), (1, "348MB")])
    ]
    assert len({r.plan.memory.block_elements for r in results}) == 2
    assert len({r.plan.norm_weight_groups[0].norms for r in results}) == 1
    assert model_bytes(tmp_path / "0") == model_bytes(tmp_path / "1") == model_bytes(tmp_path / "2")


def test_small_differences_are_measured_in_float64(tmp_path: Path) -> None:
    """In float32 the squares of the entries are 0."""
    for name, step in (("base", 0.0), ("a", 1e-25), ("b", 2e-25)):
        save_model(tmp_path / name, {"w": ("F32", np.full(100, step, np.float32))})
    assert alnico.norm_weights(["a", "b"], base="base", mode="linear").norms[0] == pytest.approx(
        (1e-24, 2e-24), rel=1e-6
    )


def test_bf16_models_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    saved(tmp_path, "BF16")
    stored = [read_model(tmp_path / m) for m in ("base", "a", "b")]
    found = alnico.norm_weights(["a", "b"], base="base")
    assert found.norms[0] == pytest.approx([norm(stored[0], m) for m in stored[1:]], rel=1e-14)


def test_a_merge_in_memory_weighs_as_on_disk(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    alnico.merge(recipe("ties"), tmp_path / "out")
    found = alnico.merge_state_dicts(tuned, "ties", base=base, weights={"from": "l2_norm"})
    assert {n: v.tobytes() for n, v in found.items()} == {
        n: v.tobytes() for n, v in read_model(tmp_path / "out").items()
    }


def test_weights_of_slices_are_measured_over_the_whole_output(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    slices = [
        {"sources": [{"model": m, "layer_range": [i, i + 1]} for m in ("base", "a", "b")]} for i in range(2)
    ]
    given = recipe() | {"slices": slices}
    del given["models"]
    (weighing,) = alnico.merge(given, tmp_path / "out").plan.norm_weight_groups
    assert weighing.norms == pytest.approx([norm(base, m) for m in tuned], rel=1e-14)


def test_a_stage_is_weighed_when_it_is_made(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    (tmp_path / "r.yml").write_text(
        "name: half\nmerge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 0.5}}]\n"
        "unrelated: allow\n---\n"
        "merge_method: linear\nbase_model: base\nmodels: [half, b]\nunrelated: allow\nparameters: {weight: {from: l2_norm}}\n"
    )
    (result,) = alnico.merge_documents(tmp_path / "r.yml", tmp_path / "out")
    assert result.plan.norm_weight_groups[0].norms == pytest.approx(
        [norm(base, tuned[0]) / 2, norm(base, tuned[1])], rel=1e-6
    )


# ---- a model that is the base -----------------------------------------------------------------------------------------


def test_a_model_that_equals_the_base_is_refused_in_linear_and_power_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    base, _ = saved(tmp_path)
    save_model(tmp_path / "same", {n: ("F32", v) for n, v in base.items()})
    given = recipe(weight={"from": "l2_norm", "mode": "power"}) | {"models": ["a", "same"]}
    expected = (
        "same equals base, the base: its L2 norm is 0, and mode power divides by it; expected models that differ from the base. "
        "Remove the model, or use mode: exp."
    )
    with pytest.raises(MismatchError, match=f"^{re.escape(expected)}$"):
        alnico.merge(given, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_model_that_equals_the_base_takes_the_largest_weight_in_exp_and_is_told(tmp_path: Path) -> None:
    base, _ = saved(tmp_path)
    save_model(tmp_path / "same", {n: ("F32", v) for n, v in base.items()})
    result = alnico.merge(recipe() | {"models": ["a", "same", "b"]}, tmp_path / "out")
    weights = result.plan.norm_weight_groups[0].weights
    assert weights is not None
    assert max(weights) == weights[1]
    assert [n for n in result.plan.notes if "largest weight" in n] == [
        "same equals the base, so mode exp gives it the largest weight and the models that differ smaller ones. "
        "Remove it if this is unintended."
    ]


def test_one_frozen_tensor_of_one_model_is_refused_by_its_name(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    save_model(
        tmp_path / "b", {n: ("F32", base[n] if n == "norm.weight" else v) for n, v in tuned[1].items()}
    )
    with pytest.raises(MismatchError, match=r"^norm\.weight: b equals base, the base: its L2 norm is 0"):
        alnico.merge(recipe(weight={"from": "l2_norm", "mode": "linear", "per": "tensor"}), tmp_path / "out")


def test_a_nan_is_named_before_anything_is_merged(tmp_path: Path) -> None:
    _, tuned = saved(tmp_path)
    tuned[1]["layers.0.w"][3, 2] = np.nan
    save_model(tmp_path / "b", {n: ("F32", v) for n, v in tuned[1].items()})
    with pytest.raises(NonFiniteError, match=r"^layers\.0\.w\[3, 2\]: b has NaN; expected finite numbers"):
        alnico.merge(recipe(), tmp_path / "out")


# ---- taken up ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, time
from pathlib import Path
import alnico
from alnico.events import TensorDone
import sys

def watch(event):
    if isinstance(event, TensorDone):
        while '"norms"' not in Path(".out.alnico-part/journal.jsonl").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

alnico.merge(sys.argv[1], "out", threads=1, watch=watch)
"""


def test_a_run_killed_after_measuring_does_not_measure_again(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "r.yml").write_text(json.dumps(recipe()))
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, "r.yml"], capture_output=True, timeout=120, env=os.environ
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    events: list[Event] = []
    result = alnico.merge("r.yml", "out", watch=events.append)
    assert not [e for e in events if isinstance(e, Measuring)]
    assert (
        result.plan.norm_weight_groups[0].norms
        == alnico.merge("r.yml", "whole").plan.norm_weight_groups[0].norms
    )
    assert model_bytes(Path("out")) == model_bytes(Path("whole"))


# ---- what is told -----------------------------------------------------------------------------------------------------


def test_plan_lock_and_card_say_what_is_measured_and_what_came_out(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    setting = {"from": "l2_norm", "mode": "exp", "beta": 1.0, "scale": 1.0, "per": "model"}
    planned = {"weight": setting, "base": "base", "tensors": 4, "models": [{"model": "a"}, {"model": "b"}]}
    assert alnico.plan(recipe()).summary()["weights"] == [planned]
    result = alnico.merge(recipe(), tmp_path / "out")
    lock = json.loads((tmp_path / "out" / "alnico.lock.json").read_text())
    (told,) = lock["weights"]
    assert [m["l2_norm"] for m in told["models"]] == pytest.approx([norm(base, m) for m in tuned], rel=1e-14)
    assert [m["weight"] for m in told["models"]] == list(result.plan.norm_weight_groups[0].weights or ())
    card = (tmp_path / "out" / "README.md").read_text()
    first, second = (f"| {m['model']} | {m['l2_norm']:.6g} | {m['weight']:.6f} |" for m in told["models"])
    assert f"| model | L2 norm | weight |\n|---|---|---|\n{first}\n{second}\n" in card


def test_the_base_of_a_linear_merge_must_fit_where_norms_are_measured_from_it(tmp_path: Path) -> None:
    base, _ = saved(tmp_path)
    save_model(tmp_path / "base", {n: ("F32", v[:5]) for n, v in base.items()})
    with pytest.raises(MismatchError, match="base"):
        alnico.plan(recipe("linear"))


def test_of_one_model_the_weight_is_the_scale_and_nothing_is_measured(tmp_path: Path) -> None:
    saved(tmp_path)
    events: list[Event] = []
    given = recipe(weight={"from": "l2_norm", "scale": 0.5}) | {"models": ["a"]}
    alnico.merge(given, tmp_path / "out", watch=events.append)
    assert not [e for e in events if isinstance(e, Measuring)]
    alnico.merge(recipe(weight=0.5) | {"models": ["a"]}, tmp_path / "by_hand")
    assert merged_bytes(tmp_path / "out") == merged_bytes(tmp_path / "by_hand")


# ---- norms of an analysis ---------------------------------------------------------------------------------------------


def analysed(
    root: Path, from_base: dict[str, np.ndarray], models: dict[str, dict[str, np.ndarray]], **changed: Any
) -> Path:
    """A summary of an analysis, as far as it is read: its keys are those of ``Analysis.data``."""
    tensors = [
        {
            "name": n,
            "shape": list(v.shape),
            "changes": [{"l2": norm(from_base, m, (n,))} for m in models.values()],
        }
        for n, v in from_base.items()
    ]
    named = [{"name": n, "reference": n, "commit": None} for n in models]
    data = {
        "schema": 1,
        "base": {"name": "base", "reference": "base", "commit": None},
        "models": named,
        "tensors": tensors,
    }
    root.mkdir(exist_ok=True)
    (root / "summary.json").write_text(json.dumps({**data, **changed}))
    return root


@pytest.mark.parametrize("per", ["model", "layer", "tensor"])
def test_norms_of_an_analysis_give_the_weights_of_measured_ones_and_nothing_is_measured(
    per: str, tmp_path: Path
) -> None:
    base, tuned = saved(tmp_path)
    report = analysed(tmp_path / "report", base, {"b": tuned[1], "a": tuned[0]})
    events: list[Event] = []
    result = alnico.merge(
        recipe(weight={"from": "analysis", "path": str(report), "per": per}),
        tmp_path / "out",
        watch=events.append,
    )
    assert not [e for e in events if isinstance(e, Measuring)]
    measured = alnico.merge(recipe(weight={"from": "l2_norm", "per": per}), tmp_path / "measured")
    for one, other in zip(result.plan.norm_weight_groups, measured.plan.norm_weight_groups, strict=True):
        assert one.norms == pytest.approx(other.norms, rel=1e-14)
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_what_an_analysis_writes_is_what_is_read(tmp_path: Path) -> None:
    """The referee's analysis, in the form of summary.json."""
    base, tuned = saved(tmp_path)
    found = reference_analysis(base, {"a": tuned[0], "b": tuned[1]}).data()
    found["base"]["reference"] = "base"
    for model, name in zip(found["models"], "ab", strict=True):
        model["reference"] = name
    (tmp_path / "summary.json").write_text(json.dumps(found))
    weights = alnico.norm_weights(["b", "a"], base="base", analysis="summary.json")
    assert weights.norms[0] == pytest.approx([norm(base, tuned[1]), norm(base, tuned[0])], rel=1e-6)


def test_an_adapter_weighs_what_it_changes(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    low = {"A": np.full((2, 5), 0.5, np.float32), "B": np.full((33, 2), 0.25, np.float32)}
    names = {f"base_model.model.layers.0.lora_{side}.weight": ("F32", v) for side, v in low.items()}
    save_model(
        tmp_path / "base2",
        {("layers.0.weight" if n == "layers.0.w" else n): ("F32", v) for n, v in base.items()},
    )
    save_model(
        tmp_path / "a2",
        {("layers.0.weight" if n == "layers.0.w" else n): ("F32", v) for n, v in tuned[0].items()},
    )
    save_file(tmp_path / "adapter" / "adapter_model.safetensors", names)
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"]})
    )
    found = alnico.norm_weights(["base2+adapter", "a2"], base="base2")
    change = 2.0 * (low["B"].astype(np.float64) @ low["A"])
    assert found.norms[0] == pytest.approx(
        (float(np.sqrt((change**2).sum())), norm(base, tuned[0])), rel=1e-6
    )


def test_an_analysis_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    weight = {"from": "analysis", "path": "report"}
    analysed(tmp_path / "report", base, {"a": tuned[0]})
    with pytest.raises(
        MismatchError, match=r"^report/summary\.json: has no model b; it has a\. Analyze all models"
    ):
        alnico.plan(recipe(weight=weight))
    both = {"a": tuned[0], "b": tuned[1]}
    analysed(tmp_path / "report", base, both, base={"name": "x", "reference": "a", "commit": None})
    with pytest.raises(
        MismatchError, match=r"^report/summary\.json: its base is a, that of the merge is base; expected"
    ):
        alnico.plan(recipe(weight=weight))
    analysed(tmp_path / "report", {n: v for n, v in base.items() if n != "layers.0.w"}, both)
    with pytest.raises(
        MismatchError, match=r"^report/summary\.json: has no norms of layers\.0\.w as it is merged here"
    ):
        alnico.plan(recipe(weight=weight))
    report = analysed(tmp_path / "report", base, both) / "summary.json"
    report.write_text(report.read_text().replace("[12]", "[3, 4]"))
    with pytest.raises(
        MismatchError, match=r"^report/summary\.json: has no norms of norm\.weight as it is merged here"
    ):
        alnico.plan(recipe(weight=weight))
    analysed(tmp_path / "report", base, both, schema=7)
    with pytest.raises(ModelError, match=r"^report/summary\.json: is not an analysis of schema 1"):
        alnico.plan(recipe(weight=weight))
    analysed(tmp_path / "report", base, both, tensors=[{"name": "w"}])
    with pytest.raises(ModelError, match=r"^report/summary\.json: is damaged"):
        alnico.plan(recipe(weight=weight))


def test_a_merge_is_not_taken_up_with_another_analysis(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path)
    given = recipe(weight={"from": "analysis", "path": "report"})
    analysed(tmp_path / "report", base, {"a": tuned[0], "b": tuned[1]})

    class Interrupted(Exception):
        pass

    def watch(event: Event) -> None:
        if type(event).__name__ == "TensorDone":
            raise Interrupted

    with pytest.raises(Interrupted):
        alnico.merge(given, "out", threads=1, watch=watch)
    analysed(tmp_path / "report", base, {"a": tuned[1], "b": tuned[0]})
    with pytest.raises(OutputError, match="changed since it began: the analysis that weights are made from"):
        alnico.merge(given, "out")


# ---- without a merge --------------------------------------------------------------------------------------------------


def test_weights_are_what_the_merge_takes(tmp_path: Path) -> None:
    saved(tmp_path)
    found = alnico.norm_weights(["a", "b"], base="base", per="layer", mode="power", alpha=2)
    merged = alnico.merge(recipe(weight=found.setting.data()), tmp_path / "out").plan
    assert [(w.place, w.norms, w.weights) for w in merged.norm_weight_groups] == list(
        zip(found.places, found.norms, found.weights, strict=True)
    )
    assert found.models == ("a", "b")


def test_one_model_has_no_weight_to_find(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(MethodError, match=r"^weights: nothing depends on them; expected two models or more"):
        alnico.norm_weights(["a"], base="base")


def test_only_what_is_read_again_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass to measure and one to mix."""
    saved(tmp_path)
    monkeypatch.setattr("alnico.engine.run.check_relatedness", lambda plan, *_: plan)
    reads: list[tuple[str, str]] = []
    real = FileModel.read_into

    def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        reads.append((model.label, name))
        real(model, name, offset, buffer)

    monkeypatch.setattr(FileModel, "read_into", read_into)
    alnico.merge(recipe(), tmp_path / "out")
    assert {(m, n): reads.count((m, n)) for m, n in reads} == {
        (m, n): 2 for m in ("base", "a", "b") for n in NAMES
    }
