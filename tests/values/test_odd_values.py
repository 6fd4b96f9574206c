"""Values that look like tensors, names that are none, and modules that wrap or compute their weights: merged right, or an error of ours."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import alnico
from alnico.errors import AlnicoError, MismatchError, ModelError


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


def masked() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(torch.ones(3), torch.tensor([True, False, True]))


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "numpy mask": (
        lambda: np.ma.array([1.0, 2.0], mask=[0, 1], dtype=np.float32),
        "is an array with 1 masked values",
    ),
    "nested": (lambda: nested(torch.strided), "is a nested tensor, of several shapes"),
    "nested, jagged": (lambda: nested(torch.jagged), "is a nested tensor, of several shapes"),
    "lazy parameter": (nn.UninitializedParameter, "is an uninitialised parameter of a lazy module"),
    "lazy buffer": (nn.UninitializedBuffer, "is an uninitialised parameter of a lazy module"),
    "fake": (fake, "is a FakeTensor, whose values cannot be read"),
    "masked": (masked, "is a MaskedTensor, whose values"),
    "wrapper": (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "is a TwoTensor, whose values"),
    "meta": (lambda: torch.empty(3, device="meta"), "is on meta"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "is on cpu, with the layout torch.sparse_coo"),
    "objects": (lambda: np.array([1.0], object), "has the dtype object"),
    "fields": (lambda: np.zeros(1, [("a", "f4")]), "has the dtype"),
    "dates": (lambda: np.array(["2020-01-01"], "M8[D]"), "has the dtype datetime64"),
    "big endian": (lambda: np.ones(2, ">f4"), "has the dtype >f4"),
    "extended": (lambda: np.ones(2, np.longdouble), "has the dtype float128"),
    "complex128": (lambda: np.ones(2, complex), "has the dtype complex128"),
    "list": (lambda: [1.0], "is a list; expected a numpy array or a torch tensor"),
    "None": (lambda: None, "is a NoneType; expected a numpy array or a torch tensor"),
}


@pytest.mark.parametrize("kind", list(ODD))
def test_a_value_without_plain_numbers_is_an_error_that_names_the_key(kind: str) -> None:
    make, said = ODD[kind]
    good, odd = {"w": np.ones(3, np.float32)}, {"a.w": make()}
    with pytest.raises(ModelError, match=rf"^state_dicts\[1\]: a\.w: {said}"):
        alnico.merge_state_dicts([good, odd])
    with pytest.raises(ModelError, match=rf"a\.w: {said}"):
        alnico.TaskVector(odd, odd).cosine(alnico.TaskVector(odd, good))
    with pytest.raises(ModelError, match=rf"^base: a\.w: {said}"):
        alnico.search_scales(odd, [good], lambda _: 1.0)


@pytest.mark.parametrize("key", ["\ud800", "a\udfffb", 3, None, ("w",)])
def test_a_key_that_is_no_name_is_an_error(key: Any) -> None:
    with pytest.raises(
        ModelError, match=r"state_dicts\[0\]: has the key .*; expected tensor names\. Rename it\."
    ):
        alnico.merge_state_dicts([{key: np.ones(2, np.float32)}] * 2)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_odd_values_that_have_plain_numbers_are_merged() -> None:
    values = np.float32([[1, 2], [3, 4]])
    for same in (
        np.matrix(values),
        np.ma.array(values),
        values.T.copy().T,
        np.broadcast_to(np.float32(2), (2, 2)),
        values[::-1],
    ):
        found = alnico.merge_state_dicts([{"w": same, "": same}, {"w": same, "": same}])
        assert np.array_equal(found["w"], np.asarray(same))
        assert list(found) == ["w", ""]
    with torch.inference_mode():
        inference = torch.tensor(values)
    for tensor in (inference, nn.Parameter(torch.tensor(values)), torch.tensor([1 + 2j]).conj().imag):
        assert torch.equal(alnico.merge_state_dicts([{"w": tensor}, {"w": tensor}])["w"], tensor)


def test_two_names_that_are_one_without_what_compile_adds_are_an_error() -> None:
    state = {"a._orig_mod.w": np.ones(2, np.float32), "a.w": np.zeros(2, np.float32)}
    with pytest.raises(ModelError, match=r"which are the same name without torch.compile's prefix"):
        alnico.merge_state_dicts([state, state])


# ---- modules --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


@pytest.fixture(scope="module")
def nets() -> tuple[Net, list[Net]]:
    torch.manual_seed(0)
    base = Net()
    tuned = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        for parameter in (p for net in tuned for p in net.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base, tuned


def compiled_inside(net: nn.Module) -> nn.Module:
    made = copy.deepcopy(net)
    made.first = torch.compile(made.first)
    return made


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "compile of DataParallel": lambda net: torch.compile(nn.DataParallel(net)),
    "DataParallel of compile": lambda net: nn.DataParallel(torch.compile(net)),
    "a layer in compile": compiled_inside,
    "average": torch.optim.swa_utils.AveragedModel,
    "script": torch.jit.script,
}


@pytest.mark.parametrize("kind", list(WRAPPERS))
@pytest.mark.filterwarnings("ignore")
def test_wrapped_modules_merge_as_the_modules_inside(kind: str, nets: tuple[Net, list[Net]]) -> None:
    base, tuned = nets
    wrap, asked = WRAPPERS[kind], {"density": 0.5, "unrelated": "allow"}
    expected = alnico.merge_models(tuned, "ties", base=base, **asked).state_dict()
    found = alnico.merge_models([wrap(net) for net in tuned], "ties", base=base, **asked)
    assert all(torch.equal(found.state_dict()[n], v) for n, v in expected.items())
    assert alnico.TaskVector(wrap(tuned[0]), wrap(base)).norm() == alnico.TaskVector(tuned[0], base).norm()
    given = [wrap(net) for net in tuned]
    assert alnico.search_scales(wrap(base), given, lambda _: 1.0, 2, unrelated="allow").scales == (0.5, 0.5)
    if kind != "average":  # its own count is no tensor of the models
        filled = wrap(copy.deepcopy(base))
        (base + 0.5 * alnico.TaskVector(tuned[0], base)).apply(filled, unrelated="allow")
        made = (base + 0.5 * alnico.TaskVector(tuned[0], base)).state_dict(unrelated="allow")
        held = [v for v in filled.state_dict().values() if isinstance(v, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(held, made.values(), strict=True))


def test_modules_that_compute_their_weights_are_copied(nets: tuple[Net, list[Net]]) -> None:
    _, tuned = nets

    def normed(net: Net) -> Net:
        made = copy.deepcopy(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(made.first)
        return made

    def pruned(net: Net) -> Net:
        made = copy.deepcopy(net)
        mask = torch.ones(4, 3)
        mask[0] = 0
        prune.custom_from_mask(made.first, "weight", mask)
        return made

    for wrap in (normed, pruned):
        merged = alnico.merge_models([wrap(net) for net in tuned], "linear", unrelated="allow")
        assert torch.isfinite(merged(torch.ones(1, 3))).all()
    mean = (tuned[0].first.weight + tuned[1].first.weight)[1:] / 2
    assert torch.allclose(merged.first.weight[1:], mean)
    assert not merged.first.weight[0].any()


def test_modules_pruned_by_different_masks_are_refused(nets: tuple[Net, list[Net]]) -> None:
    pruned = [copy.deepcopy(net) for net in nets[1]]
    for net in pruned:
        prune.l1_unstructured(net.first, "weight", amount=0.5)
    with pytest.raises(
        MismatchError,
        match=r"first\.weight_mask: models\[0\] and models\[1\] are pruned with different masks",
    ):
        alnico.merge_models(pruned, "linear", unrelated="allow")


@pytest.mark.filterwarnings("ignore")
def test_weights_of_quantised_layers_are_not_dropped_without_a_word(nets: tuple[Net, list[Net]]) -> None:
    quantised = [torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear}) for net in nets[1]]
    with pytest.raises(
        ModelError, match=r"models\[0\]: first\._packed_params\._packed_params: is a tuple of tensors"
    ):
        alnico.merge_models(quantised, "linear", unrelated="allow")


def test_a_module_whose_tensors_cannot_be_filled_is_an_error(nets: tuple[Net, list[Net]]) -> None:
    base, tuned = nets
    target = copy.deepcopy(base)
    target.first.weight = nn.Parameter(TwoTensor(torch.ones(4, 3), torch.ones(4, 3)))
    with pytest.raises(AlnicoError, match=r"the module to fill \(Net\): first\.weight: is a TwoTensor"):
        (base + alnico.TaskVector(tuned[0], base)).apply(target, unrelated="allow")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_autocast_does_not_round_what_peft_merges(nets: tuple[Net, list[Net]]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(
        copy.deepcopy(nets[0]), peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    )
    expected = alnico.merge_state_dicts([wrapped, nets[0]], unrelated="allow")
    with torch.autocast("cpu", torch.bfloat16):
        found = alnico.merge_state_dicts([wrapped, nets[0]], unrelated="allow")
    assert all(torch.equal(found[n], v) for n, v in expected.items())


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan")])
def test_numbers_of_python_that_no_float_holds_are_errors_of_ours(number: Any) -> None:
    base, tuned = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    tau = alnico.TaskVector(tuned, base)
    for call in (lambda: number * tau, lambda: tau / 0, lambda: (1e308 * tau) * 1e308):
        with pytest.raises(AlnicoError, match=r"a task vector is (multiplied|divided) by"):
            call()
    with pytest.raises(AlnicoError, match="scales"):
        alnico.search_scales(base, [tuned], lambda _: 1.0, 2, high=number)
    with pytest.raises(AlnicoError, match="seed is"):
        alnico.merge_state_dicts([base, tuned], seed=number)
    if isinstance(number, float):
        with pytest.raises(AlnicoError, match="threads is"):
            alnico.merge_state_dicts([base, tuned], threads=number)
