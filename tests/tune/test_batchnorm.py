"""BatchNorm after a merge: statistics measured on data, held against numpy in float64."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import alnico
from alnico.errors import AlnicoError
from alnico.installation import install_hint


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Dropout(0.5),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 2),
    )


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 8, 8, generator=generator) * 2 + 1 for _ in range(count)]


def test_merged_statistics_become_those_of_the_data(tmp_path):
    data = batches(3)
    for seed, name in enumerate("ab"):
        model = net(seed).train()
        for batch in data[: seed + 1]:
            model(batch)
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    recipe = {
        "merge_method": "linear",
        "models": [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")],
        "parameters": {"weight": 0.5},
    }
    result = alnico.merge(recipe, tmp_path / "out.safetensors")
    assert any("recalibrate_batchnorm" in note for note in result.plan.notes)
    with alnico.open_model(tmp_path / "out.safetensors") as merged:
        state = {name: torch.from_numpy(np.array(merged.read(name))) for name in merged.tensors}
    assert state["2.num_batches_tracked"] == 1
    model = net(2).eval()
    model.load_state_dict(state)
    model[0].train()
    assert alnico.recalibrate_batchnorm(model, iter(data)) == 3
    outputs = [
        model[1](batch).detach().double().numpy().transpose(1, 0, 2, 3).reshape(4, -1) for batch in data
    ]
    np.testing.assert_allclose(
        model[2].running_mean, np.mean([o.mean(1) for o in outputs], 0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        model[2].running_var, np.mean([o.var(1, ddof=1) for o in outputs], 0), rtol=1e-5
    )
    assert model[2].num_batches_tracked == 3
    assert model[2].momentum == 0.3
    assert [m.training for m in model] == [True, False, False, False, False, False]
    assert not model.training


def test_a_batch_may_be_keyword_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, *, pixels):
            return self.norm(pixels)

    model = Named()
    assert alnico.recalibrate_batchnorm(model, [{"pixels": torch.tensor([[1.0, 2.0], [3.0, 6.0]])}]) == 1
    np.testing.assert_array_equal(model.norm.running_mean, [2.0, 4.0])
    assert model.training


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        (
            nn.Linear(2, 2),
            [torch.ones(2, 2)],
            "Linear has no BatchNorm layer with running statistics; expected at least one.",
        ),
        (
            nn.BatchNorm1d(2, track_running_stats=False),
            [torch.ones(2, 2)],
            "BatchNorm1d has no BatchNorm layer with running",
        ),
        (nn.BatchNorm1d(2), [], "there are no batches; expected at least one."),
    ],
)
def test_what_cannot_be_recalibrated_is_refused(model, data, told):
    with pytest.raises(AlnicoError) as caught:
        alnico.recalibrate_batchnorm(model, data)
    assert str(caught.value).startswith(f"recalibrate_batchnorm: {told}")


def test_a_batch_that_fails_leaves_everything_as_it_was():
    model = net(0).eval()
    model[2].running_mean.fill_(7.0)
    with pytest.raises(RuntimeError):
        alnico.recalibrate_batchnorm(model, [*batches(1), torch.ones(1)])
    assert (model[2].running_mean == 7.0).all()
    assert (model[2].num_batches_tracked, model[2].momentum, model[2].training) == (0, 0.3, False)


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(AlnicoError) as caught:
        alnico.recalibrate_batchnorm(None, [])
    assert (
        str(caught.value)
        == f"recalibrate_batchnorm needs torch, which is not installed. {install_hint('torch')}"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_beside_plain_layers_too():
    scripted = torch.jit.script(nn.BatchNorm2d(3))
    with pytest.raises(
        AlnicoError, match="has BatchNorm layers in TorchScript, whose momentum cannot be changed"
    ):
        alnico.recalibrate_batchnorm(nn.Sequential(scripted, nn.BatchNorm2d(3)), batches(1))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["DataParallel", "compile"]
)
def test_wrapped_modules_are_recalibrated_as_plain_ones(wrap):
    plain, wrapped = net(0), wrap(net(0))
    assert (
        alnico.recalibrate_batchnorm(plain, batches(2))
        == alnico.recalibrate_batchnorm(wrapped, batches(2))
        == 2
    )
    found = [value for name, value in wrapped.state_dict().items() if "running" in name]
    assert all(
        torch.equal(a, b) for a, b in zip(found, (plain[2].running_mean, plain[2].running_var), strict=True)
    )
