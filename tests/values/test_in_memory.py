"""Merges in memory: the bits of the same merge on disk, from dicts and modules that stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import alnico
from alnico.checkpoint.memory_model import MemoryModel
from alnico.errors import AlnicoError, MismatchError, ModelError, RecipeError
from alnico.methods import registry
from made import read_file, save_model
from methods.cases import MODELS, SETTINGS, options
from methods.merging import recipe_for
from methods.sides import with_statistics

SHAPES = {"w": (90, 70), "n": (33,), "one": (), "none": (0, 4)}


def made(count: int, seed: int = 0) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    random = np.random.default_rng(seed)
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    tuned = [
        {n: (v + 0.1 * random.standard_normal(v.shape)).astype(np.float32) for n, v in base.items()}
        for _ in range(count)
    ]
    for model in (base, *tuned):
        model["ids"] = np.arange(4)
    return base, tuned


def saved(root: Path, models: Mapping[str, Mapping[str, np.ndarray]], dtype: str = "F32") -> dict[str, Path]:
    """Write models; arrays of integers as I64."""
    return {
        name: save_model(
            root / name, {n: ("I64" if v.dtype == np.int64 else dtype, v) for n, v in model.items()}
        )
        for name, model in models.items()
    }


def as_torch(model: Mapping[str, np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        n: torch.tensor(v) if v.dtype == np.int64 else torch.tensor(v).to(dtype) for n, v in model.items()
    }


def raw(tensor: torch.Tensor | np.ndarray) -> bytes:
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- the bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(registry()))
def test_a_merge_in_memory_has_the_bits_of_the_merge_on_disk(name: str, tmp_path: Path) -> None:
    count = MODELS.get(name, (3,))[0]
    given = options(SETTINGS[name][-1], count)
    base, tuned = made(count)
    paths = list(saved(tmp_path, {f"m{i}": m for i, m in enumerate(tuned)}).values())
    base_path = paths[0] if registry()[name].base == "first" else saved(tmp_path, {"base": base})["base"]
    alnico.merge(recipe_for(name, paths, base_path, given, seed=7), tmp_path / "out.safetensors", threads=1)
    in_memory = {"first": tuned[0], "unused": None}.get(registry()[name].base, base)
    given = with_statistics(given, paths)
    found = alnico.merge_state_dicts(tuned, name, base=in_memory, seed=7, threads=2, **given)
    expected = read_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    for tensor, values in found.items():
        assert isinstance(values, np.ndarray)
        assert values.shape == expected[tensor][1].shape
        assert raw(values) == raw(expected[tensor][1]), tensor


def test_torch_tensors_in_bfloat16_have_the_bits_of_the_files(tmp_path: Path) -> None:
    base, tuned = made(2)
    saved(tmp_path, {"base": base, "a": tuned[0], "b": tuned[1]}, "BF16")
    recipe = {
        "merge_method": "dare_ties",
        "base_model": str(tmp_path / "base"),
        "parameters": {"density": 0.5},
    }
    alnico.merge(
        {**recipe, "models": [str(tmp_path / "a"), str(tmp_path / "b")]}, tmp_path / "out.safetensors"
    )
    half = [as_torch(m, torch.bfloat16) for m in (base, *tuned)]
    found = alnico.merge_state_dicts(half[1:], "dare_ties", base=half[0], density=0.5)
    data = (tmp_path / "out.safetensors").read_bytes()
    expected = read_file(tmp_path / "out.safetensors")
    assert all(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in found.values())
    assert {n: v.dtype for n, v in found.items()} == dict.fromkeys(SHAPES, torch.bfloat16) | {
        "ids": torch.int64
    }
    for name in SHAPES:
        assert np.array_equal(found[name].float().numpy(), expected[name][1])
        assert raw(found[name]) in data


def test_models_on_disk_and_in_memory_merge_with_one_another(tmp_path: Path) -> None:
    base, tuned = made(2)
    paths = saved(tmp_path, {"base": base, "a": tuned[0]})
    mixed = alnico.merge_state_dicts(
        [paths["a"], as_torch(tuned[1])], "ties", base=str(paths["base"]), density=0.5
    )
    alone = alnico.merge_state_dicts(tuned, "ties", base=base, density=0.5)
    assert {n: raw(v) for n, v in mixed.items()} == {n: raw(v) for n, v in alone.items()}


def test_lists_are_values_in_the_order_of_the_models_and_numbers_go_for_all() -> None:
    base, tuned = made(2)
    found = alnico.merge_state_dicts(
        tuned, "task_arithmetic", base=base, weights=np.float64([0.5, -1.0]), scale=np.float32(2.0)
    )
    exact = base["w"].astype(np.float64) + 2 * (
        0.5 * (tuned[0]["w"].astype(np.float64) - base["w"]) - (tuned[1]["w"] - base["w"])
    )
    assert np.abs(found["w"] - exact).max() < 1e-6


def test_the_dtype_is_the_promotion_or_what_is_asked_for() -> None:
    first, second = as_torch(made(1)[0], torch.float16), as_torch(made(1, seed=1)[0], torch.bfloat16)
    assert alnico.merge_state_dicts([first, second])["w"].dtype == torch.float32
    for asked in ("bfloat16", torch.bfloat16):
        assert alnico.merge_state_dicts([first, second], dtype=asked)["w"].dtype == torch.bfloat16
    assert alnico.merge_state_dicts([{"w": np.ones(3)}] * 2, dtype=np.float32)["w"].dtype == np.float32


# ---- tensors as they lie ----------------------------------------------------------------------------------------------


def strided() -> dict[str, Any]:
    grid = np.arange(7 * 5 * 3, dtype=np.float32).reshape(7, 5, 3)
    wide = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    return {
        "plain": grid,
        "turned": grid.T,
        "backwards": grid[::-1],
        "every second": grid[:, ::2],
        "broadcast": np.broadcast_to(np.float32(3), (4, 5)),
        "scalar": np.array(2.5),
        "empty": np.empty((0, 3), np.float16),
        "flags": np.arange(9) % 2 == 0,
        "bf16 turned": wide.bfloat16().T,
        "bf16 part": wide.bfloat16()[:, 3:7],
        "float8": wide.to(torch.float8_e4m3fn),
        "expanded": torch.ones(3, 1).expand(3, 4),
        "torch scalar": torch.tensor(1.5, dtype=torch.float64),
        "torch empty": torch.empty(2, 0),
        "torch flags": wide.T > 3,
        "parameter": nn.Parameter(wide),
        "conjugate": torch.tensor([[1 + 2j, 3 - 1j]], dtype=torch.complex64).conj(),
        "minus": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj().imag,
    }


@pytest.mark.parametrize("name", list(strided()))
def test_any_strides_and_dtypes_are_read_by_parts(name: str) -> None:
    value = strided()[name]
    model = MemoryModel("m", {name: value})
    expected = raw(
        value
        if isinstance(value, np.ndarray)
        else value.detach().clone(memory_format=torch.contiguous_format)
    )
    if isinstance(value, torch.Tensor) and value.is_complex():
        expected = value.resolve_conj().numpy().tobytes()
    assert model.tensors[name].shape == tuple(value.shape)
    assert model.tensors[name].byte_size == len(expected)
    for offset, size in [
        (0, len(expected)),
        (0, len(expected) // 2),
        (len(expected) // 3, len(expected) // 3),
        (len(expected), 0),
    ]:
        buffer = bytearray(size)
        model.read_into(name, offset, memoryview(buffer))
        assert bytes(buffer) == expected[offset : offset + size]


def test_contiguous_tensors_are_read_where_they_lie() -> None:
    given = {"a": np.zeros(4, np.float32), "b": torch.zeros(4, dtype=torch.bfloat16)}
    model = MemoryModel("m", given)
    given["a"][0], given["b"][0] = 1.0, 1.0
    for name, first in (("a", np.float32(1).tobytes()), ("b", b"\x80\x3f")):
        buffer = bytearray(len(first))
        model.read_into(name, 0, memoryview(buffer))
        assert bytes(buffer) == first
    assert model.reading_bytes == 0
    assert MemoryModel("m", {"a": np.zeros((4, 5), np.float32).T}).reading_bytes == 80


def test_inputs_are_never_changed() -> None:
    base, tuned = made(2)
    given = [as_torch(m) for m in (base, *tuned)]
    before = copy.deepcopy(given)
    found = alnico.merge_state_dicts(given[1:], "ties", base=given[0], weights=[0.0, 0.0])
    for values in found.values():
        values.zero_()
    assert all(torch.equal(a[n], b[n]) for a, b in zip(given, before, strict=True) for n in a)


def test_tied_tensors_stay_tied_and_are_merged_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    base, one, two = Tied(), Tied(), Tied()
    merged = alnico.merge_models([one, two], "dare_ties", base=base, density=0.5)
    assert merged.head.weight is merged.embed.weight
    state = alnico.merge_state_dicts(
        [m.state_dict() for m in (one, two)], "dare_ties", base=base.state_dict(), density=0.5
    )
    assert list(state) == ["embed.weight", "head.weight"]
    assert state["head.weight"] is state["embed.weight"]
    assert torch.equal(state["embed.weight"], merged.embed.weight)  # by one draw, though the names differ


def test_what_one_model_alone_ties_is_not_tied() -> None:
    shared = np.ones(3, np.float32)
    other = {"a": np.zeros(3, np.float32), "b": np.full(3, 5, np.float32)}
    found = alnico.merge_state_dicts([{"a": shared, "b": shared}, other])
    assert (found["a"].tolist(), found["b"].tolist()) == ([0.5] * 3, [3.0] * 3)
    found = alnico.merge_state_dicts(
        [{"a": shared, "b": shared}, {"a": other["a"]}]
    )  # as in a file, which has one of the two
    assert found["b"] is found["a"]


# ---- modules ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Parameters, float and integer buffers, and a recurrent layer, which keeps views of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.memory = nn.LSTM(3, 2, batch_first=True)
        self.register_buffer("ids", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory(self.inner(x).unsqueeze(1))[0]


def small(seed: int) -> Small:
    torch.manual_seed(seed)
    return Small()


def test_a_module_comes_back_merged_and_otherwise_as_it_was() -> None:
    base, one, two = small(0).eval(), small(1), small(2)
    base.inner[0].weight.requires_grad_(False)
    before = [copy.deepcopy(m.state_dict()) for m in (base, one, two)]
    merged = alnico.merge_models([one, two], "task_arithmetic", base=base, weights=[0.5, 0.25])
    assert isinstance(merged, Small)
    assert merged is not base
    assert (merged.training, one.training) == (False, True)
    assert (merged.inner[0].weight.requires_grad, merged.inner[0].bias.requires_grad) == (False, True)
    for name, held in merged.state_dict().items():
        b, x, y = (state[name].double() for state in before)
        assert torch.allclose(held.double(), b + 0.5 * (x - b) + 0.25 * (y - b), atol=1e-6), name
    for model, state in zip((base, one, two), before, strict=True):
        assert all(torch.equal(model.state_dict()[n], state[n]) for n in state)
    by_hand = small(3).eval()
    by_hand.load_state_dict(merged.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(by_hand(x), merged(x))


def test_without_a_base_the_result_is_a_copy_of_the_first_model() -> None:
    models = [small(0).bfloat16(), small(1)]
    merged = alnico.merge_models(models, "linear")
    assert merged is not models[0]
    assert (
        merged.inner[0].weight.dtype == torch.float32
    )  # the promotion: no rounding to the first model's dtype
    mean = (models[0].inner[0].weight.double() + models[1].inner[0].weight.double()) / 2
    assert torch.allclose(merged.inner[0].weight.double(), mean, atol=1e-7)
    assert models[0].inner[0].weight.dtype == torch.bfloat16


def test_wrappers_are_looked_into() -> None:
    models = [small(0), small(1)]
    expected = alnico.merge_models(models, "linear").state_dict()
    merged = alnico.merge_models([nn.DataParallel(models[0]), models[1]], "linear")
    assert isinstance(merged, Small)
    assert all(torch.equal(merged.state_dict()[n], v) for n, v in expected.items())
    state = {n.replace("inner.", "inner._orig_mod."): v for n, v in models[1].state_dict().items()}
    found = alnico.merge_state_dicts([models[0], state])
    assert all(torch.equal(found[n], v) for n, v in expected.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch
def test_compiled_modules_are_looked_into() -> None:
    models = [small(0), small(1)]
    expected = alnico.merge_models(models, "linear").state_dict()
    models[1].inner = torch.compile(models[1].inner)
    merged = alnico.merge_models([torch.compile(models[0]), models[1]], "linear", base=models[1])
    assert all(
        torch.equal(merged.state_dict()[n.replace("inner.", "inner._orig_mod.")], v)
        for n, v in expected.items()
    )


def test_a_prefix_of_data_parallel_is_taken_off_where_others_have_it_not() -> None:
    plain, wrapped = {"a": np.zeros(2)}, {"module.a": np.ones(2)}
    with pytest.warns(UserWarning, match=r"state_dicts\[1\]: `module\.` is removed from its names"):
        assert alnico.merge_state_dicts([plain, wrapped])["a"].tolist() == [0.5, 0.5]
    assert list(alnico.merge_state_dicts([wrapped, wrapped])) == ["module.a"]


# ---- errors -----------------------------------------------------------------------------------------------------------


def told(kind: type[AlnicoError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        alnico.merge_state_dicts(*arguments, **options)
    return str(caught.value)


W = {"w": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(
    ("written", "meant"), [(1.0, True), (0, False), ("no", False), (np.float32(1), True)]
)
def test_true_and_false_may_be_numbers_and_text_as_in_a_recipe(written: Any, meant: bool) -> None:
    base, given = layered(2), [layered(0), layered(1)]
    for method, base_of in (("linear", None), ("ties", base)):
        keys = {"base": base_of} if base_of is not None else {}
        found = alnico.merge_state_dicts(given, method, weights=[0.2, 0.5], normalize=written, **keys)
        expected = alnico.merge_state_dicts(given, method, weights=[0.2, 0.5], normalize=meant, **keys)
        assert all(found[n].tobytes() == expected[n].tobytes() for n in expected)


def test_mistakes_are_those_of_a_recipe() -> None:
    assert told(RecipeError, [W, W], "linaer").startswith("unknown merge method 'linaer';")
    assert told(RecipeError, [W, W], wieght=1) == "wieght is not an option of linear. Did you mean weights?"
    assert told(RecipeError, [W, W], method="slerp", base=W, t=0.5, weights=[1, 2]) == (
        "weights has no effect on slerp; expected options of slerp: t, over. Leave it out."
    )
    assert told(RecipeError, [W, W], density=0.5) == (
        "density has no effect on linear; expected options of linear: weights, normalize. Leave it out."
    )
    assert told(RecipeError, [W, W], random_seed=0) == (
        "random_seed has no effect on linear; expected options of linear: weights, normalize. Leave it out."
    )
    assert told(RecipeError, [W, W], "ties") == (
        "ties needs base, the model that the others were fine-tuned from. Pass base."
    )
    assert told(RecipeError, [W, W, W], "slerp", t=0.5) == (
        "slerp needs base, the model to start from, one of its two. Pass base."
    )
    assert told(RecipeError, [W, W], "ties", base=W, density=1.4).startswith(
        "density is 1.4; density is the share"
    )
    assert (
        told(RecipeError, [W, W], weights=[1])
        == "weights has 1 values for 2 state_dicts; expected one for each."
    )
    assert "dtype is 'int8'" in told(RecipeError, [W, W], dtype=np.int8)
    assert told(RecipeError, W) == (
        "state_dicts is one dict of tensors; expected a list of models. Pass [state_dicts] for one model."
    )


def test_models_that_do_not_fit_are_told_by_their_place() -> None:
    assert told(MismatchError, [W, {"w": np.ones((3, 2), np.float32)}]) == (
        "w: state_dicts[0] is (2, 3), state_dicts[1] is (3, 2); expected one shape. Use models of one architecture and size."
    )
    assert told(MismatchError, [W, {"v": W["w"]}], "ties", base=dict(W)).startswith(
        "w: base has it, state_dicts[1] lacks it;"
    )
    kept = alnico.merge_state_dicts([W, {**W, "v": W["w"]}], missing="copy")
    assert kept.keys() == {"w", "v"}


def test_what_is_no_tensor_is_refused_by_name() -> None:
    assert told(ModelError, [W, {"epoch": 3}]) == (
        "state_dicts[1]: epoch: is an int; expected a numpy array or a torch tensor. "
        "Pass only tensors: from a training checkpoint, its state_dict."
    )
    assert "has the dtype object" in told(ModelError, [{"w": np.array([None])}])
    assert "has no tensors" in told(ModelError, [{}])
    assert "state_dicts[0]: is an int; expected a dict of tensors" in told(ModelError, [3])
    assert "state_dicts[0]: has the key 0, of type int; expected tensor names" in told(
        ModelError, [{0: W["w"]}]
    )
    assert "on meta" in told(ModelError, [{"w": torch.empty(2, device="meta")}])
    assert "with the layout torch.sparse_coo" in told(ModelError, [{"w": torch.eye(2).to_sparse()}])
    assert "numpy has no dtype for BF16" in told(AlnicoError, [W, W], dtype="bfloat16")
    assert "w[0, 1]: state_dicts[1] has NaN" in told(
        AlnicoError, [W, {"w": np.array([[1, np.nan, 1]] * 2, np.float32)}]
    )


def test_modules_of_another_shape_are_refused_before_anything_changes() -> None:
    with pytest.raises(RecipeError, match=r"models: holds no nn\.Module, only dicts of tensors"):
        alnico.merge_models([W, W])
    module = nn.Linear(3, 2)
    with pytest.raises(MismatchError, match=r"^extra: is not in the module \(Linear\)"):
        alnico.merge_models(
            [module, {**module.state_dict(), "extra": torch.ones(1)}], "linear", missing="copy"
        )
    merged = alnico.merge_models([module, {"weight": torch.zeros(2, 3)}], "linear", missing="drop")
    assert torch.equal(merged.bias, module.bias)
    assert torch.equal(merged.weight, module.weight / 2)


# ---- methods of their own ---------------------------------------------------------------------------------------------


def layered(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    names = ("fc1.weight", "block.fc1.bias", "fc10.weight", "xfc1.weight", "blocks.3.w", "blocks.30.w")
    return {n: random.standard_normal((12, 11)).astype(np.float32) for n in names}


def test_layers_have_the_method_of_the_first_key_that_fits_whole_components() -> None:
    base, one, two = (layered(i) for i in range(3))
    layers = {
        "fc1": {"method": "ties", "density": 0.5, "weights": [1.0, 2.0]},
        "block": {"method": "dare_ties"},
        "blocks.3": {"weight": [0.0, 1.0]},
    }
    found = alnico.merge_state_dicts([one, two], "linear", base=base, layers=layers)
    ties = alnico.merge_state_dicts([one, two], "ties", base=base, weights=[1.0, 2.0], density=0.5)
    linear = alnico.merge_state_dicts([one, two], "linear")
    expected = {n: ties[n] if n in ("fc1.weight", "block.fc1.bias") else linear[n] for n in base} | {
        "blocks.3.w": two["blocks.3.w"]
    }
    assert {n: raw(v) for n, v in found.items()} == {n: raw(v) for n, v in expected.items()}


def test_a_layer_without_a_method_has_that_of_the_call() -> None:
    base, one, two = (layered(i) for i in range(3))
    found = alnico.merge_state_dicts(
        [one, two], "task_arithmetic", base=base, layers={"fc1": {"weight": 0.0}}
    )
    assert found["fc1.weight"].tobytes() == base["fc1.weight"].tobytes()
    assert found["fc10.weight"].tobytes() != base["fc10.weight"].tobytes()


def test_keys_of_layers_that_fit_nothing_are_errors_with_the_nearest_names() -> None:
    given = [layered(0), layered(1)]
    assert told(RecipeError, given, layers={"fc2": {"method": "linear"}}) == (
        "layers['fc2'] matches no tensor; expected whole parts of a name, such as fc1 of fc1.weight. Did you mean fc1?"
    )
    assert "layers['fc1'] is of type str; expected a name with a dict" in told(
        RecipeError, given, layers={"fc1": "ties"}
    )
    assert "is not an option of ties" in told(
        RecipeError, given, base=layered(2), layers={"fc1": {"method": "ties", "dense": 0.7}}
    )


@pytest.mark.parametrize(
    ("method", "options"), [("slerp", {"t": 0.25}), ("nearswap", {"t": 0.5}), ("arcee_fusion", {})]
)
def test_a_method_that_starts_from_one_of_two_models_starts_from_the_first(
    method: str, options: dict[str, float]
) -> None:
    rng = np.random.default_rng(0)
    a, b = ({"w": rng.normal(size=(4, 6)).astype(np.float32)} for _ in range(2))
    others = [b] if method == "nearswap" else [a, b]
    expected = alnico.merge_state_dicts(others, method, base=a, **options)
    assert np.array_equal(alnico.merge_state_dicts([a, b], method, **options)["w"], expected["w"])
    if method == "slerp":
        with pytest.raises(alnico.errors.AlnicoError, match="needs base"):
            alnico.merge_state_dicts([a, b, b], method, **options)
