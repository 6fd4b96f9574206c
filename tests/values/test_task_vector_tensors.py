"""The tensors of task vectors: computed, iterated, compared, saved and loaded."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn

import alnico
from alnico import TaskVector
from alnico.cli.commands.inspect import model_text
from alnico.errors import AlnicoError, ModelError, NonFiniteError, OutputError, RecipeError, VerificationError
from alnico.models.open_models import is_lazy_model, template_of
from made import save_model


def modules(count: int = 3, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    others = [copy.deepcopy(base) for _ in range(count - 1)]
    with torch.no_grad():
        for other in others:
            for value in other.parameters():
                value += 0.1 * torch.randn_like(value)
    return [base, *others]


def exact(tuned: nn.Module, base: nn.Module) -> dict[str, torch.Tensor]:
    """The differences in float64, without whole numbers."""
    start = base.state_dict()
    return {n: v.double() - start[n].double() for n, v in tuned.state_dict().items() if v.is_floating_point()}


def test_the_tensors_are_the_differences_rounded_once() -> None:
    base, one, two = modules()
    tau = 0.3 * TaskVector(one, base) - 1.7 * TaskVector(two, base)
    first, second = exact(one, base), exact(two, base)
    expected = {n: (0.3 * first[n] - 1.7 * second[n]).float() for n in first}
    before = copy.deepcopy(base.state_dict())
    assert tau.keys() == list(tau) == list(expected)
    assert len(tau) == len(expected)
    assert "0.weight" in tau
    assert "1.num_batches_tracked" not in tau, "whole numbers have no difference"
    for found in (tau.state_dict(), dict(tau), dict(tau.items()), {n: tau[n] for n in tau}):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], v) and found[n].dtype == torch.float32 for n, v in expected.items())
    assert all(torch.equal(v, base.state_dict()[n]) for n, v in before.items())


@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_float64_stays_and_16_bits_become_float32(dtype: torch.dtype, result: torch.dtype) -> None:
    base, tuned = modules(2, dtype)
    found = TaskVector(tuned, base).state_dict()
    for name, value in exact(tuned, base).items():
        assert found[name].dtype == result
        assert torch.equal(found[name], value.to(result))


def test_dicts_of_arrays_give_arrays_and_paths_give_tensors(tmp_path: Path) -> None:
    base, tuned = {"w": np.float32([1, 2]), "n": np.array(3)}, {"w": np.float32([4, 6]), "n": np.array(3)}
    assert isinstance(TaskVector(tuned, base)["w"], np.ndarray)
    paths = [save_model(tmp_path / n, {"w": ("BF16", v)}) for n, v in (("b", base["w"]), ("t", tuned["w"]))]
    found = TaskVector(paths[1], paths[0])["w"]
    assert (found.dtype, found.tolist()) == (torch.float32, [3, 4])


def test_tied_tensors_have_all_their_names(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    base, tuned = Tied(), Tied()
    tau = TaskVector(tuned, base)
    assert list(tau) == ["embed.weight", "head.weight"]
    expected = (tuned.embed.weight - base.embed.weight).detach()
    assert torch.equal(tau["head.weight"], expected)
    tau.save(tmp_path / "tau.safetensors")
    for loaded in (TaskVector.load(tmp_path / "tau.safetensors"), TaskVector.load(tau.state_dict())):
        torch.testing.assert_close(loaded.on(base).state_dict()["head.weight"], tuned.head.weight.detach())
        torch.testing.assert_close(loaded.on(base).apply(Tied()).embed.weight, tuned.embed.weight)


def test_an_unknown_name_is_a_key_error_with_the_nearest_name() -> None:
    base, tuned = modules(2)
    for kind in (KeyError, ModelError):
        with pytest.raises(kind) as caught:
            TaskVector(tuned, base)["0.wieght"]
        assert str(caught.value) == (
            "'0.wieght': is not in the task vector; expected one of its 8 tensors. Did you mean 0.weight?"
        )


@pytest.mark.parametrize("name", ["tau.safetensors", "tau"])
def test_a_saved_task_vector_has_the_bytes_of_memory_and_is_put_on_its_base_again(
    tmp_path: Path, name: str
) -> None:
    base, one, two = modules()
    tau = 0.5 * TaskVector(one, base) + TaskVector(two, base)
    assert tau.save(tmp_path / name) == tmp_path / name
    held = tau.state_dict()
    file = tmp_path / name if name != "tau" else tmp_path / name / "model.safetensors"
    assert {n: v.tobytes() for n, v in load_file(file).items()} == {
        n: v.numpy().tobytes() for n, v in held.items()
    }
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    assert metadata["alnico.kind"] == "task vector"
    assert metadata["alnico.base"] == "Sequential"
    assert [t["coefficient"] for t in json.loads(metadata["alnico.terms"])] == [0.5, 1.0]
    loaded = TaskVector.load(tmp_path / name)
    assert repr(loaded) == f"<task vector {tmp_path / name}>"
    assert loaded.equals(tau)
    assert loaded.norm() == pytest.approx(tau.norm(), rel=1e-6)
    for coefficient in (1, -0.7):
        expected = {
            n: (base.state_dict()[n].double() + coefficient * v.double()).float() for n, v in held.items()
        }
        found = (coefficient * loaded).on(base)
        assert all(torch.equal(found.state_dict()[n], v) for n, v in expected.items())
        found.save(tmp_path / f"merged{coefficient}.safetensors")
        on_disk = load_file(tmp_path / f"merged{coefficient}.safetensors")
        assert {n: v.tobytes() for n, v in on_disk.items()} == {
            n: v.numpy().tobytes() for n, v in found.state_dict().items()
        }


def test_loaded_and_computed_task_vectors_add_up(tmp_path: Path) -> None:
    base, one, two = modules()
    first, second = TaskVector(one, base), TaskVector(two, base)
    first.save(tmp_path / "one.safetensors")
    both = TaskVector.load(tmp_path / "one.safetensors") - 2 * second
    assert both.equals(first - 2 * second, atol=1e-6)
    assert both.norm() == pytest.approx((first - 2 * second).norm(), rel=1e-6)
    assert both.cosine(first) == pytest.approx((first - 2 * second).cosine(first), rel=1e-6)
    expected = (first - 2 * second).on(base).state_dict()
    for name, value in both.on(base).state_dict().items():
        torch.testing.assert_close(value, expected[name])
    again = pickle.loads(pickle.dumps(both))
    assert again.equals(both)


def test_a_dict_of_differences_is_a_task_vector() -> None:
    base = {"w": np.float32([1, 2]), "v": np.float32([1])}
    tau = TaskVector.load({"w": np.float32([1, -1]), "v": np.float32([0])})
    assert repr(tau) == "<task vector task vector>"
    assert {n: v.tolist() for n, v in (2 * tau).on(base).state_dict().items()} == {"w": [3, 0], "v": [1]}
    part = TaskVector.load({"w": np.float32([1, -1])}, missing="copy")
    assert {n: v.tolist() for n, v in part.on(base).state_dict().items()} == {"w": [2, 1], "v": [1]}
    with pytest.raises(AlnicoError, match=r"^v: .* lacks it; expected it in all models"):
        TaskVector.load({"w": np.float32([1, -1])}).on(base).state_dict()
    with pytest.raises(
        ModelError, match="the task vector is an empty dict; expected a path, or a dict of tensors"
    ):
        TaskVector.load({})
    with pytest.raises(ModelError, match="of type int"):
        TaskVector.load(3)


def test_shards_are_read_back(tmp_path: Path) -> None:
    base, tuned = modules(2)
    tau = TaskVector(tuned, base)
    tau.save(tmp_path / "tau", max_shard_size=60)
    assert len(list((tmp_path / "tau").glob("*.safetensors"))) > 1
    assert TaskVector.load(tmp_path / "tau").equals(tau)
    assert alnico.verify(tmp_path / "tau").tensors == len(tau)


def test_a_task_vector_is_no_model(tmp_path: Path) -> None:
    base, tuned = modules(2)
    tau = TaskVector(tuned, base)
    path = tau.save(tmp_path / "tau")
    with pytest.raises(ModelError) as caught:
        alnico.merge_state_dicts([str(path), base])
    assert str(caught.value) == (
        f"{path}: is a task vector of Sequential, a difference of models; expected a whole model. Put it on its "
        f"base: alnico.TaskVector.load({str(path)!r}).on(base)."
    )
    model = save_model(tmp_path / "model", {"w": ("F32", np.ones(2, np.float32))})
    with pytest.raises(
        ModelError, match=r"does not say that it is a task vector; expected what TaskVector\.save wrote"
    ):
        TaskVector.load(model)
    assert alnico.inspect(path).summary["task_vector_of"] == "Sequential"
    assert model_text(alnico.inspect(path).data(), 0).splitlines()[1] == (
        "task vector   of Sequential; it is no model without one"
    )
    assert "task_vector_of" not in alnico.inspect(model).summary
    assert not is_lazy_model(tau)
    assert template_of([tau]) is base
    assert template_of([TaskVector.load(path)]) is None


def test_a_damaged_task_vector_is_found(tmp_path: Path) -> None:
    base, tuned = modules(2)
    path = TaskVector(tuned, base).save(tmp_path / "tau") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError):
        alnico.verify(tmp_path / "tau")


def test_a_failed_save_leaves_nothing_and_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    base, tuned = {"w": np.ones(3, np.float32)}, {"w": np.float32([1, math.nan, 1])}
    with pytest.raises(NonFiniteError, match=r"^dict 2: w\[1\] is NaN; expected finite numbers"):
        TaskVector(tuned, base).save(tmp_path / "tau.safetensors")
    assert list(tmp_path.iterdir()) == []
    huge = TaskVector({"w": np.full(3, 3e38, np.float32)}, base)
    with pytest.raises(NonFiniteError, match=r"^w\[0\] of the task vector is beyond float32"):
        (2 * huge).state_dict()
    huge.save(tmp_path / "tau.safetensors")
    with pytest.raises(OutputError):
        huge.save(tmp_path / "tau.safetensors")
    (0.5 * huge).save(tmp_path / "tau.safetensors", overwrite=True)
    assert (2 * TaskVector.load(tmp_path / "tau.safetensors")).equals(huge, atol=1e31)
    assert [p.name for p in tmp_path.iterdir()] == ["tau.safetensors"]


def test_norms_and_cosines_by_layer_and_tensor_are_those_of_float64() -> None:
    base, one, two = modules()
    tau, other = TaskVector(one, base), TaskVector(two, base)
    first, second = exact(one, base), exact(two, base)
    by_tensor = tau.norm(per="tensor")
    assert by_tensor == pytest.approx({n: float(v.norm()) for n, v in first.items()}, rel=1e-12)
    by_layer = tau.norm(per="layer")
    assert list(by_layer) == ["0", "1", "2"]
    assert by_layer["0"] == pytest.approx(math.hypot(by_tensor["0.weight"], by_tensor["0.bias"]), rel=1e-12)
    assert math.hypot(*by_layer.values()) == pytest.approx(tau.norm(), rel=1e-12)
    cosines = tau.cosine(other, per="layer")
    x, y = (torch.cat([d["2.weight"].flatten(), d["2.bias"]]) for d in (first, second))
    assert cosines["2"] == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-12)
    assert math.isnan((tau - tau).cosine(other, per="tensor")["0.weight"])
    wide = TaskVector.load({"h.0.w": np.float32([3]), "h.1.w": np.float32([4]), "end": np.float32([1])})
    assert wide.norm(per="layer") == {"h.0": 3.0, "h.1": 4.0, "end": 1.0}
    with pytest.raises(AlnicoError, match="per is 'model'; expected layer, tensor or None"):
        tau.norm(per="model")  # type: ignore[call-overload]


def test_task_vectors_are_compared_by_value() -> None:
    base, one, two = modules()
    tau = TaskVector(one, base)
    assert tau.equals(TaskVector.load(tau.state_dict()))
    assert not tau.equals(TaskVector(two, base))
    assert tau.equals(1.0001 * tau, atol=1e-3)
    assert not tau.equals(1.0001 * tau)
    assert not tau.equals(TaskVector.load({"w": np.ones(2, np.float32)}))
    with pytest.raises(AlnicoError, match="equals: the other is of type dict; expected a TaskVector"):
        tau.equals(tau.state_dict())  # type: ignore[arg-type]


def test_missing_tensors_are_refused_copied_or_dropped() -> None:
    base = {"a": np.float32([1]), "b": np.float32([1])}
    tuned = {"a": np.float32([3]), "b": np.float32([2])}
    short = {"a": np.float32([4])}
    says = (
        r"^b: .* lacks it; expected it in all models\. Use models of one architecture, or pass missing=\"copy\" or "
        r"missing=\"drop\"\.$"
    )
    for call in (
        TaskVector(short, base).keys,
        TaskVector(short, base).norm,
        TaskVector(short, base).on(base).state_dict,
        lambda: alnico.merge_state_dicts([short, base]),
    ):
        with pytest.raises(AlnicoError, match=says):
            call()
    tau = TaskVector(short, base, missing="drop") + TaskVector(tuned, base)
    assert {n: v.tolist() for n, v in tau.items()} == {"a": [5]}
    assert list((2 * tau).on(base).state_dict()) == ["a"]
    assert tau.on(base, missing="copy").state_dict()["b"].tolist() == [1]
    assert list(tau.on(base).state_dict(missing="copy")) == ["a", "b"]
    assert TaskVector(short, base).norm(missing="drop") == 3
    assert TaskVector(short, base).norm("tensor", missing="drop") == {"a": 3}
    with pytest.raises(RecipeError, match="missing is 'ignore'; expected one of error, copy, drop"):
        TaskVector(short, base, missing="ignore")
    with pytest.raises(AlnicoError, match="missing is 'drop' in one task vector and 'copy' in another"):
        TaskVector(short, base, missing="drop") - TaskVector(tuned, base, missing="copy")
    filled = tau.on(base).apply(_Two())
    assert (filled.a.tolist(), filled.b.tolist()) == ([6], [7])


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 7.0))


def test_numpy_takes_no_task_vector_for_an_array() -> None:
    base, tuned = modules(2)
    tau: Any = TaskVector(tuned, base)
    assert repr(np.float32(2) * tau) == repr(2 * tau)
    for make in (np.asarray, np.array, np.sum, np.square):
        with pytest.raises(TypeError):
            make(tau)
    assert bool(tau)
    assert sum([tau, tau, tau]).equals(3 * tau)


def test_a_stored_task_vector_of_float64_has_its_tensors(tmp_path: Path) -> None:
    base, one = modules(2, torch.float64)
    TaskVector(one, base).save(tmp_path / "t.safetensors")
    loaded = TaskVector.load(tmp_path / "t.safetensors")
    assert set(loaded) == set(exact(one, base))
    assert all(torch.equal(loaded[n], v) for n, v in exact(one, base).items())
