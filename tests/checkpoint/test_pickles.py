"""Checkpoints that torch pickles, read without torch; torch writes them here, and is the referee."""

import argparse
import collections
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import alnico
import made
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.pickle_parser import Unpickler
from alnico.checkpoint.pickles import ALLOWED_NAMES, _set_state
from alnico.checkpoint.resident_model import ResidentModel, SharedBudget
from alnico.checkpoint.weight_files import PICKLE_INDEX
from alnico.errors import ModelError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64,
]  # fmt: skip
NEWER = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    whole = torch.randn(6, 5)
    views = {
        "whole": whole, "row": whole[2], "rows": whole[1:4], "turned": whole.t(), "columns": whole[:, 1:3], "step": whole[::2, ::3],
        "expanded": whole[:1].expand(4, 5), "scalar": whole[3, 3], "empty": whole[:0], "parameter": torch.nn.Parameter(whole),
        "channels": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }  # fmt: skip
    return views | {str(d): (torch.randn(3, 4) * 50).abs().to(d) for d in DTYPES}


def same(found: np.ndarray, expected: torch.Tensor) -> bool:
    expected = expected.detach()
    values = (
        expected.float() if expected.dtype.is_floating_point and expected.dtype != torch.float64 else expected
    )
    return found.shape == tuple(expected.shape) and bool((found == values.numpy()).all())


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_every_tensor_is_read_as_torch_reads_it(tmp_path, is_zip, suffix):
    path = tmp_path / f"m{suffix}"
    expected = tensors() | ({str(d): torch.arange(6).to(d) for d in NEWER} if is_zip else {})
    torch.save(collections.OrderedDict(expected), path, _use_new_zipfile_serialization=is_zip)
    loaded = torch.load(path, weights_only=True)
    with open_model(path) as model:
        assert set(model.tensors) == set(loaded)
        for name, tensor in loaded.items():
            assert same(model.read(name), tensor), name
        assert model.held_bytes == sum(
            t.numel() * t.element_size()
            for n, t in loaded.items()
            if n in ("turned", "columns", "step", "expanded", "channels")
        )
        part = bytearray(8)
        model.read_into("turned", 12, memoryview(part))
        assert part == loaded["turned"].contiguous().numpy().tobytes()[12:20]


def lazy() -> dict[str, torch.Tensor]:
    """Tensors whose values are the negative, or the conjugate, of what torch stores."""
    torch.manual_seed(1)
    pairs, whole = torch.randn(6, 5, dtype=torch.complex64), torch.randn(6, 5)
    views = {
        "conjugate": pairs.conj(), "negated_conjugate": torch._neg_view(pairs.conj()), "negated_complex": torch._neg_view(pairs),
        "turned_conjugate": pairs.t().conj(), "turned": torch._neg_view(whole).t(), "rows": torch._neg_view(whole)[1:4],
        "expanded": torch._neg_view(whole[:1]).expand(4, 5), "parameter": torch.nn.Parameter(torch._neg_view(whole)),
        "scalar": torch._neg_view(whole[3, 3]), "empty": torch._neg_view(whole[:0]),
    }  # fmt: skip
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ]
    return views | {str(d): torch._neg_view((torch.randn(3, 4) * 50).abs().to(d)) for d in kinds}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_the_lazy_bits_of_torch_are_applied(tmp_path, is_zip):
    torch.save(lazy(), tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    loaded = {
        n: t.detach().resolve_conj().resolve_neg()
        for n, t in torch.load(tmp_path / "m.pt", weights_only=True).items()
    }
    with open_model(tmp_path / "m.pt") as model:
        for name, tensor in loaded.items():
            assert same(model.read(name), tensor), name
            expected = (
                tensor.contiguous().view(torch.uint8).numpy().tobytes()
                if tensor.dim()
                else tensor.numpy().tobytes()
            )
            assert model.tensors[name].byte_size == len(expected)
            for begin, end in ((0, len(expected)), (1, len(expected) - 1), (9, 14)):
                part = bytearray(max(0, min(end, len(expected)) - begin))
                model.read_into(name, begin, memoryview(part))
                assert part == expected[begin : begin + len(part)], name
            assert model.place_of(name) is None
        held = ("turned_conjugate", "turned", "expanded")
        assert model.held_bytes == sum(loaded[n].numel() * loaded[n].element_size() for n in held)
        resident = ResidentModel(model, SharedBudget(1 << 20))
        assert np.array_equal(
            resident.held("torch.float32"), loaded["torch.float32"].view(torch.uint8).numpy().reshape(-1)
        )


@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_a_negated_tensor_is_copied_as_its_values(tmp_path, method):
    torch.manual_seed(0)
    held = {
        "a": torch._neg_view(torch.randn(8, 8)),
        "b": torch.randn(8, 8),
        "n": torch._neg_view(torch.arange(4)),
    }
    (tmp_path / "lazy").mkdir()
    (tmp_path / "plain").mkdir()
    torch.save(held, tmp_path / "lazy" / "pytorch_model.bin")
    torch.save({n: t.resolve_neg() for n, t in held.items()}, tmp_path / "plain" / "pytorch_model.bin")
    for name in ("lazy", "plain"):
        alnico.merge(
            {"merge_method": method, "models": [{"model": str(tmp_path / name)}]}, tmp_path / f"out-{name}"
        )
    lazy, plain = (alnico.open_model(tmp_path / f"out-{n}") for n in ("lazy", "plain"))
    assert all(
        lazy.read(n).tobytes() == plain.read(n).tobytes() == held[n].resolve_neg().numpy().tobytes()
        for n in held
    )
    hashes = [
        json.loads((tmp_path / f"out-{n}" / "alnico.lock.json").read_text())["output"]
        for n in ("lazy", "plain")
    ]
    assert hashes[0] == hashes[1]
    assert alnico.diff(tmp_path / "lazy", tmp_path / "plain").is_equal


def test_a_negated_tensor_in_memory_is_not_tied_to_the_tensor_itself():
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        whole, pairs = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.complex64)
        models.append({"w": whole, "n": torch._neg_view(whole), "i": pairs.imag, "j": pairs.conj().imag})
    merged = alnico.merge_state_dicts(models, method="linear")
    for name in models[0]:
        expected = (models[0][name].double() + models[1][name].double()) / 2
        assert np.allclose(merged[name], expected.numpy(), rtol=1e-6, atol=1e-7), name


def test_attributes_of_tensors_are_named_as_left_out(tmp_path):
    marked, parameter = torch.ones(2), torch.nn.Parameter(torch._neg_view(torch.ones(3)))
    marked.tensor_model_parallel, parameter.output_dim = True, 0
    torch.save({"w": marked, "p": parameter}, tmp_path / "m.pt")
    with open_model(tmp_path / "m.pt") as model:
        assert (model.read("w").tolist(), model.read("p").tolist()) == ([1, 1], [-1, -1, -1])
        assert model.notes == [
            f"{tmp_path}/m.pt: left out, as they are attributes of tensors, which tensor files cannot store: "
            "w.tensor_model_parallel, p.output_dim."
        ]


class Marked(torch.Tensor):
    """A tensor of a class of its own."""


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), "holds a sparse tensor (_rebuild_sparse_tensor); expected dense tensors with values. Make it dense"),
        (lambda: Calling(torch._utils._rebuild_qtensor, torch.ones(2), 0, (2,), (1,), (), False, {}), "holds a quantised tensor (_rebuild_qtensor)"),
        (lambda: Calling(torch._utils._rebuild_nested_tensor, torch.ones(2), 0, 0, 0), "holds a nested tensor (_rebuild_nested_tensor)"),
        (lambda: torch.ones(2, device="meta"), "holds a tensor of the device 'meta', which has no values"),
        (lambda: torch.ones(2).as_subclass(Marked), "its pickle needs test_pickles.Marked"),
        (lambda: Calling(torch._utils._rebuild_device_tensor_from_numpy, np.ones(2), torch.float32, "cpu", False), "stored as a numpy array"),
    ],
)  # fmt: skip
def test_other_tensors_than_dense_ones_are_refused_by_what_they_are(tmp_path, thing, told):
    torch.save({"w": torch.ones(2), "x": thing()}, tmp_path / "m.pt")
    assert told in refusal(tmp_path / "m.pt")


def test_a_tensor_that_came_by_way_of_the_cpu_is_read(tmp_path):
    by_way = Calling(
        torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.ones(2), torch.float32, "cpu", False
    )
    torch.save({"w": by_way}, tmp_path / "m.pt")
    with open_model(tmp_path / "m.pt") as model:
        assert model.read("w").tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["?", "i1", "i8", "u2", "f2", "f4", "f8", "c8", ">f8", ">i4"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_scalars_of_numpy_are_numbers(kind, protocol, module):
    scalar = np.array([1.5], "f4").astype(kind)[0]
    text = pickle.dumps(scalar, protocol)
    if protocol == 2:
        text = text.replace(b"numpy._core.multiarray\n", module.encode() + b"\n")
    found = Unpickler(
        io.BytesIO(text), len(text), lambda *name: ALLOWED_NAMES[name], lambda _: None, _set_state
    ).load()
    assert (type(found), found) == (type(scalar.item()), scalar.item())


def test_a_checkpoint_of_a_trainer_may_have_scalars_of_numpy(tmp_path):
    held = {
        "state_dict": {"w": torch.ones(2), "scale": np.float32(0.5)},
        "best": np.float64(0.25),
        "epoch": 3,
    }
    torch.save(held, tmp_path / "m.ckpt")
    with open_model(tmp_path / "m.ckpt") as model:
        assert model.read("w").tolist() == [1, 1]
        assert (
            model.notes[1]
            == f"{tmp_path}/m.ckpt: left out, as they are not tensors of the model: best, epoch, state_dict.scale."
        )


def test_what_a_trainer_keeps_beside_the_weights_is_left_out(tmp_path):
    """States of random generators, words of numpy, and callbacks under their classes, as older versions of Lightning save them."""
    rest = {
        "rng": np.random.RandomState(0).get_state(),
        "text": np.str_("höhe"),
        "callbacks": {"KEY": {"best": np.float64(0.5)}},
    }
    torch.save({"state_dict": {"w": torch.ones(2)}, **rest}, tmp_path / "m.ckpt")
    name = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    rezipped(
        tmp_path / "m.ckpt",
        lambda r: r.update({"m/data.pkl": r["m/data.pkl"].replace(b"X\x03\0\0\0KEY", name)}),
    )
    with open_model(tmp_path / "m.ckpt") as model:
        assert model.read("w").tolist() == [1, 1]
        assert model.notes[1].endswith("not tensors of the model: rng, text, callbacks.")


def test_an_array_of_numpy_in_a_state_dict_is_refused(tmp_path):
    torch.save({"w": torch.ones(2), "v": np.ones(2)}, tmp_path / "m.pt")
    assert refusal(tmp_path / "m.pt") == (
        f"{tmp_path}/m.pt: v is a numpy array; expected a tensor. Convert it with torch.from_numpy and save again."
    )


def test_the_classes_of_callbacks_are_not_called(tmp_path):
    torch.save({"w": torch.ones(2), "x": {"KEY": 1}}, tmp_path / "m.pt")
    call = b"cpytorch_lightning.callbacks\nModelCheckpoint\n)R"
    rezipped(
        tmp_path / "m.pt",
        lambda r: r.update({"m/data.pkl": r["m/data.pkl"].replace(b"X\x03\0\0\0KEY", call)}),
    )
    assert "a call of something that is not an allowed name" in refusal(tmp_path / "m.pt")


def test_reading_a_pickle_loads_no_torch_and_no_large_part_of_it(tmp_path):
    torch.save({"w": torch.zeros(3_000_000), "v": torch.ones(2)}, tmp_path / "m.pt")
    code = (
        "import alnico, resource, sys; m = alnico.open_model(sys.argv[1]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "part = bytearray(4000); [m.read_into('w', i * 4000, memoryview(part)) for i in range(3000)]; "
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before; print('torch' in sys.modules, grown < 4000, m.read('v'))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.pt")], capture_output=True, text=True, check=True
    ).stdout
    assert shown == "False True [1. 1.]\n"


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_a_nested_state_dict_is_unwrapped_and_what_is_left_out_is_named(tmp_path, wrapper):
    path = tmp_path / "m.ckpt"
    torch.save(
        {"epoch": 3, wrapper: {"w": torch.ones(2), "lr": 0.1}, "optimizer": {"state": torch.ones(1)}}, path
    )
    with open_model(path) as model:
        assert list(model.tensors) == ["w"]
        assert model.notes == [
            f"{path}: the tensors are those under {wrapper}.",
            f"{path}: left out, as they are not tensors of the model: epoch, optimizer, {wrapper}.lr.",
        ]


def test_two_levels_are_unwrapped(tmp_path):
    torch.save({"model": {"state_dict": {"w": torch.ones(2)}}}, tmp_path / "m.pt")
    with open_model(tmp_path / "m.pt") as model:
        assert list(model.tensors) == ["w"]
        assert model.notes == [f"{tmp_path}/m.pt: the tensors are those under model.state_dict."]


def test_a_directory_is_read_by_its_index(tmp_path):
    files = {
        "pytorch_model-00001-of-00002.bin": {"a": torch.ones(2)},
        "pytorch_model-00002-of-00002.bin": {"b": torch.zeros(3)},
    }
    for name, held in files.items():
        torch.save(held, tmp_path / name)
    torch.save({"betas": 1}, tmp_path / "training_args.bin")
    for has_index in (False, True):
        if has_index:
            weight_map = {tensor: name for name, held in files.items() for tensor in held}
            (tmp_path / PICKLE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with open_model(tmp_path) as model:
            assert [(n, model.read(n).tolist()) for n in sorted(model.tensors)] == [
                ("a", [1, 1]),
                ("b", [0, 0, 0]),
            ]
    swapped = {"a": "pytorch_model-00002-of-00002.bin", "b": "pytorch_model-00001-of-00002.bin"}
    (tmp_path / PICKLE_INDEX).write_text(json.dumps({"weight_map": swapped}))
    assert "says that 'a' is in pytorch_model-00002-of-00002.bin, which does not hold it." in refusal(
        tmp_path
    )


def test_safetensors_go_before_pickles(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    made.save_file(tmp_path / "model.safetensors", {"w": ("F32", np.ones(1))})
    with open_model(tmp_path) as model:
        assert model.read("w") == 1


def test_which_of_two_checkpoints_is_meant_is_asked(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.zeros(1)}, tmp_path / name)
    assert refusal(tmp_path) == (
        f"{tmp_path}: has 2 checkpoints (a.pt, b.pt), expected one, or shards with an index. Give the path of the file to merge."
    )


class Calling:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (lambda mark: Calling(os.mkdir, str(mark)), "posix.mkdir"),
        (lambda mark: Calling(eval, f"open({str(mark)!r}, 'w')"), "__builtin__.eval"),
        (lambda mark: Calling(getattr, mark, "mkdir"), "__builtin__.getattr"),
        (lambda _: argparse.Namespace(lr=1), "argparse.Namespace"),
        (lambda _: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)  # fmt: skip
def test_a_pickle_that_is_more_than_tensors_is_refused_and_runs_nothing(tmp_path, is_zip, thing, name):
    path, mark = tmp_path / "m.pt", tmp_path / "mark"
    torch.save({"w": torch.ones(2), "x": thing(mark)}, path, _use_new_zipfile_serialization=is_zip)
    assert refusal(path) == (
        f"{path}: its pickle needs {name}; expected only tensors and plain values. alnico runs no code from models. "
        "Get the model as safetensors, or save its state_dict() on a machine where you trust the file."
    )
    assert not mark.exists()


def rezipped(path, change) -> None:
    """Write a checkpoint again with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    compression = change(records) or zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r.pop("m/data/0") and None, "storage '0' is missing or compressed. The file is damaged; download it again."),
        (lambda _: zipfile.ZIP_DEFLATED, "bytes or is compressed; expected at most "),
        (lambda r: r.update({"m/byteorder": b"big"}), "was written by a big-endian machine; expected little-endian."),
        (lambda r: r.update({"m/data/0": b"1234"}), "tensor 'w' has elements to 6 of its storage; expected at most 1."),
        (lambda r: r.update({"m/constants.pkl": b""}), "or a TorchScript program; expected a state dict."),
        (lambda r: r.pop("m/data.pkl") and None, "is a zip archive without one data.pkl"),
        (lambda r: r.update({"m/data.pkl": r["m/data.pkl"][:-9]}), "is not a readable torch checkpoint ("),
    ],
)  # fmt: skip
def test_a_zip_that_lies_is_refused(tmp_path, change, told):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(6)}, path)
    rezipped(path, change)
    assert told in refusal(path)


def test_a_compressed_storage_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(6)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name == "m/data/0" else zipfile.ZIP_STORED)
    assert (
        refusal(path)
        == f"{path}: storage '0' is missing or compressed. The file is damaged; download it again."
    )


def test_what_trainers_leave_beside_the_weights_is_no_model(tmp_path):
    for name in ("net.pt", "optimizer.pt", "rng_state_0.pth", "scheduler.pt", "training_args.bin"):
        torch.save({name: torch.zeros(1)}, tmp_path / name)
    with open_model(tmp_path) as model:
        assert list(model.tensors) == ["net.pt"]


def test_a_file_that_is_cut_is_refused(tmp_path):
    for is_zip in (True, False):
        torch.save({"w": torch.ones(600)}, tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
        whole = (tmp_path / "m.pt").read_bytes()
        for size in (0, 1, 10, 100, len(whole) - 5):
            (tmp_path / "cut.pt").write_bytes(whole[:size])
            assert refusal(tmp_path / "cut.pt").startswith(f"{tmp_path}/cut.pt: ")


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        ([torch.ones(1)], "holds a list; expected tensors by name."),
        (torch.ones(1), "holds a tensor; expected tensors by name."),
        ({"lr": 1, "net": {"w": torch.ones(1)}}, "holds no tensors by name (its keys: lr, net)."),
        ({}, "holds no tensors by name (it is empty)."),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "its pickle needs torch.ComplexDoubleStorage"),
    ],
)  # fmt: skip
def test_a_checkpoint_without_tensors_by_name_is_refused(tmp_path, thing, told):
    torch.save(thing, tmp_path / "m.pt")
    assert told in refusal(tmp_path / "m.pt")


def test_a_view_outside_its_storage_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(6)[2:]}, path)
    rezipped(
        path,
        lambda r: r.update({"m/data.pkl": r["m/data.pkl"].replace(b"K\x02K\x04\x85", b"K\x03K\x04\x85")}),
    )
    assert (
        refusal(path)
        == f"{path}: tensor 'w' has elements to 7 of its storage; expected at most 6. Get the file from its source."
    )


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"w": [1.0]}))
    assert "is a pickle, but not a torch checkpoint" in refusal(tmp_path / "m.pt")


def test_pickled_models_merge_as_safetensors_do(tmp_path):
    random = np.random.default_rng(0)
    names = {"a": {}, "b": {}}
    for model, held in names.items():
        held |= {
            "conv.weight": random.standard_normal((8, 3, 3, 3)),
            "fc.weight": random.standard_normal((4, 8)),
        }
        held |= {name: values.astype(np.float32) for name, values in held.items()}
        torch.save(
            {"state_dict": {n: torch.from_numpy(v) for n, v in held.items()}}, tmp_path / f"{model}.pt"
        )
        made.save_file(tmp_path / f"{model}.safetensors", {n: ("F32", v) for n, v in held.items()})
    for suffix in (".pt", ".safetensors"):
        recipe = {
            "merge_method": "linear",
            "models": [str(tmp_path / f"{m}{suffix}") for m in names],
            "parameters": {"weight": 0.5},
        }
        alnico.merge(recipe, tmp_path / f"out{suffix}.safetensors")
    alnico.merge({**recipe, "models": [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]}, tmp_path / "out")
    one, other, folder = (
        made.read_model(tmp_path / n) for n in ("out.pt.safetensors", "out.safetensors.safetensors", "out")
    )
    for name, values in names["a"].items():
        expected = 0.5 * values.astype(np.float64) + 0.5 * names["b"][name]
        np.testing.assert_allclose(one[name], expected, rtol=1e-6, atol=1e-7)
        assert one[name].tobytes() == other[name].tobytes() == folder[name].tobytes()
