"""Stored vectors as values: on models of every kind, and on modules in place, undone to the bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import alnico
import made
import made_vectors
from alnico.errors import AlnicoError, MismatchError, ModelError
from alnico.store.stored_task_vector import StoredTaskVector

SHAPES = {"0.weight": (24, 16), "0.bias": (24,), "2.weight": (8, 24), "2.bias": (8,)}
ENCODINGS = {"exact": "sparse", "whole": "whole", "plain": "difference", "small": "int4"}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)


@pytest.fixture(params=["F32", "BF16"])
def world(request: Any, tmp_path: Path) -> Mapping[str, Any]:
    """A base as a file and its tensors, and vectors of several fine-tunes in several encodings."""
    dtype = request.param
    random = np.random.default_rng(1)
    base = {n: (dtype, random.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}
    path = made.save_file(tmp_path / "base.safetensors", base)
    vectors, tuned = {}, {}
    for number, (name, encoding) in enumerate(ENCODINGS.items()):
        some = {
            n: (dtype, (v + 0.1 * random.standard_normal(v.shape)).astype(np.float32))
            if n != "2.bias"
            else (dtype, v)
            for n, (_, v) in base.items()
        }
        encodings = {n: encoding for n in SHAPES if n != "2.bias"}  # 2.bias is absent: equal
        folder = tmp_path / "vectors" / name / "1"
        made_vectors.write_vector(
            folder, base, some, encodings, name=name, scale={"suggested": 0.1 * (number + 1)}
        )
        vectors[name] = StoredTaskVector(folder, f"{name}@1")
        tuned[name] = some
    return {
        "path": path,
        "dtype": dtype,
        "base": base,
        "vectors": vectors,
        "tuned": tuned,
        "folder": tmp_path,
    }


def module_of(world: Any, kind: torch.dtype | None = None) -> nn.Sequential:
    from safetensors.torch import load_file

    state = load_file(world["path"])
    module = net(next(iter(state.values())).dtype)
    module.load_state_dict(state)
    return module.to(kind) if kind is not None else module


def bits(module: nn.Module) -> dict[str, bytes]:
    return {
        n: v.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for n, v in module.state_dict().items()
    }


def test_equip_and_unequip_give_the_bits_of_the_base_and_of_the_files(world: Any, tmp_path: Path) -> None:
    module = module_of(world)
    before = bits(module)
    for name, vector in world["vectors"].items():
        equipment = vector.equip(module, 0.7)
        alnico.equip(world["path"], {str(vector.folder): 0.7}, out := tmp_path / f"{name}.safetensors")
        written = {n: made.encoded(dtype, values) for n, (dtype, values) in made.read_file(out).items()}
        assert bits(module) == written
        assert before != written
        width = 4 if world["dtype"] == "F32" else 2
        assert equipment.kept_bytes == width * (24 * 16 + 24 + 8 * 24)
        assert equipment.tensors == 3
        assert vector.unequip(module).kept_bytes == 0
        assert bits(module) == before


def test_vectors_are_taken_off_in_any_order(world: Any) -> None:
    module, other = module_of(world), module_of(world)
    before = bits(module)
    exact, plain, small = (world["vectors"][n] for n in ("exact", "plain", "small"))
    exact.equip(module, 0.5)
    plain.equip(module, -0.3)
    small.equip(module, 0.2)
    assert [label for label, _ in exact.unequip(module).vectors] == ["plain@1", "small@1"]
    plain.equip(other, -0.3)
    small.equip(other, 0.2)
    assert bits(module) == bits(other)
    small.unequip(module)
    plain.unequip(other)
    small.unequip(other)
    assert bits(other) == before
    plain.unequip(module)
    assert bits(module) == before


def test_a_module_with_several_vectors_is_the_merge_of_all(world: Any, tmp_path: Path) -> None:
    module = module_of(world)
    weights = {"exact": 0.5, "plain": -0.3, "small": 0.2}
    for name, weight in weights.items():
        world["vectors"][name].equip(module, weight)
    chosen = {str(world["vectors"][n].folder): w for n, w in weights.items()}
    alnico.equip(world["path"], chosen, tmp_path / "out.safetensors")
    found = made.read_file(tmp_path / "out.safetensors")
    assert bits(module) == {n: made.encoded(d, v) for n, (d, v) in found.items()}


def test_without_a_weight_it_is_the_suggested_one(world: Any) -> None:
    one, other = module_of(world), module_of(world)
    assert world["vectors"]["plain"].equip(one).vectors == (("plain@1", pytest.approx(0.3)),)
    world["vectors"]["plain"].equip(other, world["vectors"]["plain"].manifest.scale.suggested)
    assert bits(one) == bits(other)


def test_a_module_in_float32_of_a_base_in_bfloat16_is_its_base(world: Any) -> None:
    if world["dtype"] == "F32":
        pytest.skip("the base is in float32")
    module = module_of(world, torch.float32)
    before = bits(module)
    world["vectors"]["plain"].equip(module, 0.5)
    start = made.read_file(world["path"])
    for name, value in module.state_dict().items():
        tuned = made.decoded("BF16", made.encoded("BF16", world["tuned"]["plain"][name][1]))
        first = start[name][1].astype(np.float64)
        exact = first + 0.5 * (tuned.reshape(first.shape) - first)
        assert np.abs(value.numpy() - exact).max() < 1e-6
    world["vectors"]["plain"].unequip(module)
    assert bits(module) == before
    module[0].weight.data[3, 4] += 1e-6  # no value of bfloat16, so it is not the base
    changed = bits(module)
    with pytest.raises(MismatchError, match=r"0\.weight"):
        world["vectors"]["plain"].equip(module, 0.5)
    assert bits(module) == changed


def test_another_module_is_refused_and_stays_as_it_is(world: Any) -> None:
    torch.manual_seed(0)
    module = net(torch.bfloat16 if world["dtype"] == "BF16" else torch.float32)
    before = bits(module)
    for vector in world["vectors"].values():
        with pytest.raises(MismatchError, match=r"0\.(weight|bias)"):
            vector.equip(module)
    assert bits(module) == before
    world["vectors"]["plain"].equip(module, 0.5, allow_base_mismatch=True)
    assert bits(module) != before
    world["vectors"]["plain"].unequip(module)
    assert bits(module) == before
    with pytest.raises(MismatchError):
        world["vectors"]["exact"].equip(module, allow_base_mismatch=True)
    assert bits(module) == before


def test_one_changed_tensor_of_the_base_is_named(world: Any) -> None:
    module = module_of(world)
    module[2].weight.data[0, 0] += 1
    before = bits(module)
    with pytest.raises(MismatchError, match=r"2\.weight"):
        world["vectors"]["plain"].equip(module)
    assert bits(module) == before
    module = module_of(world)
    module[2].bias.data[0] += 1  # no vector touches it
    world["vectors"]["plain"].equip(module)
    world["vectors"]["plain"].unequip(module)


def test_a_module_that_was_trained_meanwhile_is_not_undone(world: Any) -> None:
    module = module_of(world)
    plain, small = world["vectors"]["plain"], world["vectors"]["small"]
    plain.equip(module)
    with torch.no_grad():
        module[0].bias[5] += 1
    before = bits(module)
    words = r"0\.bias: was changed in the module \(Sequential\) since it was equipped with plain@1"
    with pytest.raises(MismatchError, match=words):
        plain.unequip(module)
    with pytest.raises(MismatchError, match=words):
        small.equip(module)
    assert bits(module) == before
    with torch.no_grad():
        module[0].bias[5] -= 1
        module[2].bias[0] += 1  # not touched by the vector: stays
    if bits(module)["0.bias"] == bits(module_with(world, plain))["0.bias"]:
        plain.unequip(module)
        assert module[2].bias[0] != module_of(world)[2].bias[0]


def module_with(world: Any, vector: Any) -> nn.Module:
    module = module_of(world)
    vector.equip(module)
    return module


def test_a_vector_is_on_a_module_once_and_only_what_is_on_it_comes_off(world: Any) -> None:
    module = module_of(world)
    plain, small = world["vectors"]["plain"], world["vectors"]["small"]
    plain.equip(module, 0.5)
    with pytest.raises(AlnicoError, match=r"plain@1: is on the module \(Sequential\) already"):
        plain.equip(module, 0.2)
    with pytest.raises(AlnicoError, match=r"small@1: is not on the module \(Sequential\); .* it has plain@1"):
        small.unequip(module)
    with pytest.raises(AlnicoError, match="the module to equip is of type dict"):
        plain.equip({})
    with pytest.raises(AlnicoError, match="weight is nan"):
        small.equip(module, float("nan"))


def test_an_error_midway_leaves_the_module_as_it_was(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from alnico.store import module_equipment

    monkeypatch.setattr(module_equipment, "GROUP_BYTES", 1)  # a tensor at a time
    module = module_of(world)
    world["vectors"]["exact"].equip(module, 0.5)
    before = bits(module)
    calls = iter(range(100))
    real = module_equipment.run_in_memory

    def failing(plan: Any) -> Any:
        if next(calls) == 2:
            raise OSError("the disk is gone")
        return real(plan)

    monkeypatch.setattr(module_equipment, "run_in_memory", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        world["vectors"]["plain"].equip(module, 0.5)
    assert bits(module) == before
    monkeypatch.setattr(module_equipment, "run_in_memory", real)
    world["vectors"]["exact"].unequip(module)
    assert bits(module) == bits(module_of(world))


def test_a_copy_of_an_equipped_module_is_taken_off_by_itself(world: Any) -> None:
    module = module_of(world)
    plain = world["vectors"]["plain"]
    plain.equip(module)
    twin = copy.deepcopy(module)
    plain.unequip(module)
    assert bits(twin) != bits(module)
    plain.unequip(twin)
    assert bits(twin) == bits(module) == bits(module_of(world))


def test_parameters_stay_the_same_objects_with_their_gradients(world: Any) -> None:
    module = module_of(world)
    parameters = {n: (p, p.data_ptr(), p.requires_grad) for n, p in module.named_parameters()}
    world["vectors"]["plain"].equip(module)
    for name, parameter in module.named_parameters():
        assert (parameter, parameter.data_ptr(), parameter.requires_grad) == parameters[name]
    assert "_alnico_equipment" not in module.state_dict()


def test_a_tied_tensor_is_kept_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, table: torch.Tensor) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 8, _weight=table)
            self.head = nn.Linear(8, 32, bias=False)
            self.head.weight = self.embed.weight

    random = np.random.default_rng(2)
    base = {"embed.weight": ("F32", random.standard_normal((32, 8)).astype(np.float32))}
    tuned = {"embed.weight": ("F32", base["embed.weight"][1] + np.float32(0.5))}
    made_vectors.write_vector(tmp_path / "v", base, tuned, {"embed.weight": "sparse"})
    module = Tied(torch.tensor(base["embed.weight"][1]))
    vector = StoredTaskVector(tmp_path / "v")
    equipment = vector.equip(module, 1.0)
    assert (equipment.tensors, equipment.kept_bytes) == (1, 4 * 32 * 8)
    assert module.head.weight is module.embed.weight
    assert (module.head.weight.detach().numpy() == tuned["embed.weight"][1]).all()
    vector.unequip(module)
    assert (module.head.weight.detach().numpy() == base["embed.weight"][1]).all()


def test_a_module_in_a_wrapper_is_the_module_inside(world: Any) -> None:
    module = module_of(world)
    world["vectors"]["plain"].equip(nn.DataParallel(module))
    assert bits(module) != bits(module_of(world))
    world["vectors"]["plain"].unequip(module)
    assert bits(module) == bits(module_of(world))


def test_a_module_with_peft_adapters_is_refused(world: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    wrapped = peft.get_peft_model(module_of(world), config)
    with pytest.raises(ModelError, match="has PEFT adapters"):
        world["vectors"]["plain"].equip(wrapped)


def test_a_dropped_module_frees_what_is_kept(world: Any) -> None:
    import weakref

    module = module_of(world)
    world["vectors"]["plain"].equip(module)
    watched = weakref.ref(module)
    del module
    gc.collect()
    assert watched() is None


# Values


def exact_sum(world: Any, name: str, weight: float) -> dict[str, np.ndarray]:
    start = made.read_file(world["path"])
    entries = world["vectors"][name].manifest.tensors
    files = made.read_file(world["vectors"][name].folder / "taskvector.safetensors")
    out = {}
    for tensor, entry in entries.items():
        first = start[tensor][1].astype(np.float64)
        if entry.encoding == "absent":
            out[tensor] = first
            continue
        parts = {part: files[stored][1] for part, stored in entry.stored.items()}
        if ENCODINGS[name] in ("sparse", "whole"):
            d = world["dtype"]
            after = made.decoded(d, made.encoded(d, world["tuned"][name][tensor][1])).reshape(first.shape)
            difference = after - first
        else:
            wide = {p: v.astype(np.float64) if v.dtype.kind == "f" else v for p, v in parts.items()}
            difference = made_vectors.decode(
                ENCODINGS[name], wide, {"shape": entry.shape, "scale": entry.scale}
            )
        out[tensor] = first + weight * difference
    return out


@pytest.mark.parametrize("name", list(ENCODINGS))
@pytest.mark.parametrize("kind", ["path", "dict", "module", "open"])
def test_a_stored_vector_goes_on_every_kind_of_base(world: Any, name: str, kind: str) -> None:
    base: Any = str(world["path"])
    if kind == "dict":
        base = dict(module_of(world).state_dict())
    elif kind == "module":
        base = module_of(world)
    elif kind == "open":
        base = alnico.open_model(base)
    lazy = (
        base + 0.7 * world["vectors"][name] if kind != "module" else (0.7 * world["vectors"][name]).on(base)
    )
    state = lazy.state_dict(dtype="float32")
    for tensor, exact in exact_sum(world, name, 0.7).items():
        assert np.abs(np.asarray(state[tensor]) - exact).max() < 2e-6


def test_a_stored_vector_on_a_wrong_base_is_refused(world: Any) -> None:
    other = {n: torch.zeros_like(v) for n, v in module_of(world).state_dict().items()}
    for vector in world["vectors"].values():
        with pytest.raises(MismatchError, match=r"0\.(weight|bias)"):
            (other + vector).state_dict()


def test_sums_of_stored_vectors_are_task_vectors(world: Any) -> None:
    plain, small = world["vectors"]["plain"], world["vectors"]["small"]
    both = 0.5 * plain - 0.2 * small
    assert isinstance(both, alnico.TaskVector)
    first, second = exact_sum(world, "plain", 0.5), exact_sum(world, "small", -0.2)
    start = {n: v.astype(np.float64) for n, (_, v) in made.read_file(world["path"]).items()}
    state = (str(world["path"]) + both).state_dict(dtype="float32")
    for name, value in state.items():
        assert np.abs(np.asarray(value) - (first[name] + second[name] - start[name])).max() < 4e-6


def test_arithmetic_vectors_have_tensors_norms_and_cosines_without_their_base(world: Any) -> None:
    plain, small = world["vectors"]["plain"], world["vectors"]["small"]
    start = {n: v.astype(np.float64) for n, (_, v) in made.read_file(world["path"]).items()}
    of = {
        name: {n: v - start[n] for n, v in exact_sum(world, name, 1.0).items()} for name in ("plain", "small")
    }
    assert list(plain) == list(SHAPES)
    assert np.abs(np.asarray(plain["0.weight"]) - of["plain"]["0.weight"]).max() < 1e-6
    assert not np.asarray(plain["2.bias"]).any()
    first, second = (np.concatenate([v.ravel() for v in of[name].values()]) for name in of)
    assert plain.norm() == pytest.approx(np.linalg.norm(first), rel=1e-6)
    assert plain.cosine(small) == pytest.approx(
        first @ second / np.linalg.norm(first) / np.linalg.norm(second), rel=1e-5
    )
    loaded = alnico.TaskVector.load(plain.folder)
    assert loaded.equals(plain)


def test_new_values_have_differences_where_their_base_is(world: Any) -> None:
    exact = world["vectors"]["exact"]
    with pytest.raises(
        ModelError, match=r"is stored as new values, so its difference needs the base made/base"
    ):
        exact.norm()
    manifest = exact.folder / "taskvector.json"
    manifest.write_text(manifest.read_text().replace('"made/base"', f'"{world["path"]}"'))
    found = StoredTaskVector(exact.folder)
    start = {n: v.astype(np.float64) for n, (_, v) in made.read_file(world["path"]).items()}
    of = {n: v - start[n] for n, v in exact_sum(world, "exact", 1.0).items()}
    assert found.norm() == pytest.approx(np.sqrt(sum((v**2).sum() for v in of.values())), rel=1e-9)
    assert np.abs(np.asarray(found["0.weight"]) - of["0.weight"]).max() < 1e-7
