"""What is a model on disk, and what is refused; files are written by the safetensors package."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch

import made
from alnico.checkpoint.files import MAX_OPEN_FILES
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.weight_files import INDEX
from alnico.errors import ModelError, RunError

TENSORS = {
    "a": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
    "b": ("BF16", np.array([1.5, -2.0], np.float32)),
    "c": ("I64", np.array([7, -7])),
    "d": ("F16", np.float16([[0.5]])),
}


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


def write_index(directory, weight_map) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def names_and_values(path):
    with open_model(path) as model:
        return {name: model.read(name) for name in model.tensors}


def check_tensors(found) -> None:
    assert set(found) == set(TENSORS)
    for name, (_, values) in TENSORS.items():
        np.testing.assert_array_equal(found[name], values)


# What is a model.


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_directory_is_read_with_its_index(tmp_path, shards):
    made.save_model(tmp_path, TENSORS, {"hidden_size": 3}, shards)
    check_tensors(names_and_values(tmp_path))
    with open_model(tmp_path) as model:
        assert model.config == {"hidden_size": 3}
        assert model.directory == tmp_path
        assert len(model.identity()) == shards


def test_numbered_shards_are_read_without_an_index(tmp_path):
    made.save_model(tmp_path, TENSORS, shards=2)
    (tmp_path / INDEX).unlink()
    check_tensors(names_and_values(tmp_path))
    with open_model(tmp_path) as model:
        assert model.config == {}


def test_one_file_is_a_model(tmp_path):
    path = made.save_file(tmp_path / "any name.safetensors", TENSORS)
    check_tensors(names_and_values(path))
    with open_model(str(path)) as model:
        assert model.label == str(path)
        assert model.directory is None
        assert model.config == {}


def test_a_directory_with_one_file_of_any_name_is_a_model(tmp_path):
    made.save_file(tmp_path / "weights.safetensors", TENSORS)
    check_tensors(names_and_values(tmp_path))


def test_model_safetensors_goes_before_other_files(tmp_path):
    made.save_file(tmp_path / "model.safetensors", TENSORS)
    made.save_file(tmp_path / "consolidated.safetensors", {"other": TENSORS["a"]})
    made.save_file(tmp_path / "model-00001-of-00002.safetensors", {"other": TENSORS["a"]})
    check_tensors(names_and_values(tmp_path))


def test_an_index_goes_before_all_files(tmp_path):
    made.save_model(tmp_path, TENSORS, shards=2)
    made.save_file(tmp_path / "model.safetensors", {"other": TENSORS["a"]})
    check_tensors(names_and_values(tmp_path))


def test_shards_may_lie_in_a_folder_of_the_model(tmp_path):
    made.save_file(tmp_path / "deep" / "x.safetensors", TENSORS)
    write_index(tmp_path, dict.fromkeys(TENSORS, "deep/x.safetensors"))
    check_tensors(names_and_values(tmp_path))


def test_a_shard_may_be_a_link_within_the_hubs_cache(tmp_path):
    made.save_file(tmp_path / "blobs" / "0a1b", TENSORS)
    (tmp_path / "snapshots" / "c0").mkdir(parents=True)
    (tmp_path / "snapshots" / "c0" / "model.safetensors").symlink_to("../../blobs/0a1b")
    check_tensors(names_and_values(tmp_path / "snapshots" / "c0"))


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    made.save_model(tmp_path / "m", TENSORS)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_tensors(names_and_values("~/m"))


def test_a_folder_named_like_a_shard_is_no_shard(tmp_path):
    made.save_file(tmp_path / "weights.safetensors", TENSORS)
    (tmp_path / "model.safetensors").mkdir()
    check_tensors(names_and_values(tmp_path))


# What is not there, or not whole.


def test_a_missing_path_is_refused(tmp_path):
    expected = (
        "model {!r}: no such directory or file; expected a directory with safetensors files, one such file, or a model on the hub "
        "as owner/name or owner/name@revision. Check the path, or write the hub id with its owner."
    )
    for path in (
        str(tmp_path / "none"),
        "some-model",
        "a/b/c",
        "./a/b",
        "a/b.safetensors",
        "~no-such-user-of-this-machine/model",
    ):
        assert refusal(path) == expected.format(path)


def test_a_path_the_system_cannot_look_at_is_refused():
    assert (
        refusal("m" * 300)
        == f"{'m' * 300}: cannot be read (File name too long). Check the path and its permissions."
    )


def test_an_empty_directory_is_refused(tmp_path):
    assert (
        refusal(tmp_path)
        == f"{tmp_path}: has no .safetensors or .bin file, expected a model. It has no files. Check the path."
    )


def test_a_lora_adapter_without_its_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    made.save_file(tmp_path / "adapter_model.safetensors", TENSORS)
    assert refusal(tmp_path) == (
        f"{tmp_path}: is a LoRA adapter, expected a whole model. Name it together with its base: BASE+{tmp_path}."
    )


def test_a_missing_numbered_shard_is_named(tmp_path):
    made.save_model(tmp_path, TENSORS, shards=3)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path}: model-00002-of-00003.safetensors is missing; expected the 3 shards of one model, or an index ({INDEX}). "
        "Complete the download."
    )


def test_a_shard_of_another_set_is_named(tmp_path):
    made.save_model(tmp_path, TENSORS, shards=2)
    (tmp_path / INDEX).unlink()
    made.save_file(tmp_path / "model-00003-of-00004.safetensors", TENSORS)
    assert refusal(tmp_path) == (
        f"{tmp_path}: has model-00003-of-00004.safetensors next to model-00001-of-00002.safetensors; "
        f"expected the 2 shards of one model, or an index ({INDEX}). Complete the download."
    )


def test_a_set_of_no_shards_is_refused(tmp_path):
    made.save_file(tmp_path / "model-00000-of-00000.safetensors", TENSORS)
    assert refusal(tmp_path).startswith(f"{tmp_path}: model-00001-of-00001.safetensors is missing; ")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("x", "y"):
        made.save_file(tmp_path / f"{name}.safetensors", {"a": TENSORS["a"]})
    assert refusal(tmp_path) == (
        f"{tmp_path}: tensor 'a' is in x.safetensors and in y.safetensors; "
        "expected it in one file. Remove the file that does not belong to the model."
    )


def test_a_file_with_a_damaged_header_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    assert (
        refusal(tmp_path)
        == f"{path}: the header begins with b'[', expected '{{'. The file is not safetensors."
    )
    path.write_bytes(b"\x02\0\0")
    assert refusal(path).startswith(f"{path}: the file has 3 bytes; ")
    path.write_bytes(b"")
    assert refusal(path) == f"{path}: is empty (0 bytes); expected safetensors. Download the file again."


# The index.


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "..\\x.safetensors", "a/../../x.safetensors", "", ".", "a\0b"],
)
def test_an_index_that_points_outside_is_refused(tmp_path, name):
    made.save_file(tmp_path / "x.safetensors", TENSORS)
    (tmp_path / "m" / "a").mkdir(parents=True)
    write_index(tmp_path / "m", {"a": name})
    assert refusal(tmp_path / "m") == (
        f"{tmp_path}/m/{INDEX}: places tensor 'a' in {name!r}, outside the model's directory; "
        "expected a file inside it. Do not use this model: its index is hostile or damaged."
    )


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    write_index(tmp_path, {"a": "x.safetensors"})
    assert (
        refusal(tmp_path)
        == f"{tmp_path}/{INDEX}: lists x.safetensors, which does not exist. Complete the download."
    )


def test_an_index_of_other_shards_is_refused(tmp_path):
    made.save_model(tmp_path, TENSORS, shards=2)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_index(tmp_path, {"a": first, "b": first, "c": second, "d": second, "e": second})
    message = (
        "{}: says that {!r} is in {}, which does not hold it. "
        "The index and the shards are from different downloads; download the model again."
    )
    assert refusal(tmp_path) == message.format(tmp_path / INDEX, "e", second)
    write_index(tmp_path, {"a": second, "b": first, "c": second, "d": second})
    assert refusal(tmp_path) == message.format(tmp_path / INDEX, "a", second)


def test_a_tensor_the_index_does_not_list_is_refused(tmp_path):
    made.save_model(tmp_path, TENSORS, shards=2)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_index(tmp_path, {"a": first, "b": first, "c": second})
    assert refusal(tmp_path) == (
        f"{tmp_path}/{second}: holds 'd', which {INDEX} does not list (1 such tensors). "
        "The index and the shards are from different downloads; download the model again."
    )


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": []}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, {"weight_map": {}}],
    ids=str,
)
def test_an_index_without_a_map_is_refused(tmp_path, index):
    made.save_file(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert refusal(tmp_path) == (
        f"{tmp_path}/{INDEX}: has no weight_map from tensor names to files. Get the index from the model's source."
    )


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)). "
               "The file is damaged; download it again."),
        (b"[" * 100_000, "is not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string). "
                         "The file is damaged; download it again."),
        (b'"\xff"', "is not JSON ('utf-8' codec can't decode byte 0xff in position 1: invalid start byte). "
                    "The file is damaged; download it again."),
        (b"[]", "holds a JSON list, expected an object. Check the model."),
    ],
    ids=["cut", "nested", "no UTF-8", "no object"],
)  # fmt: skip
def test_damaged_json_is_refused_by_name(tmp_path, name, text, message):
    made.save_file(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / name).write_bytes(text)
    assert refusal(tmp_path) == f"{tmp_path}/{name}: {message}"


# Quantised weights.

QUANTISED = (
    "its weights are quantised ({}) in a way that is not read; expected one of those in docs/formats.md. "
    "Use the full-precision model."
)


def test_a_quantised_config_is_refused(tmp_path):
    made.save_model(tmp_path, TENSORS, {"quantization_config": {"quant_method": "fp8"}})
    assert refusal(tmp_path) == f"{tmp_path}: " + QUANTISED.format("config.json says 'fp8'")
    (tmp_path / "config.json").write_text('{"quantization_config": true}')
    assert refusal(tmp_path) == f"{tmp_path}: " + QUANTISED.format("config.json has a quantization_config")
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    check_tensors(names_and_values(tmp_path))


@pytest.mark.parametrize("suffix", [".weight_scale_inv", ".weight_scale", ".qweight", ".absmax"])
def test_scales_beside_the_weights_are_refused(tmp_path, suffix):
    path = made.save_file(tmp_path / "x.safetensors", {"layer" + suffix: TENSORS["a"]})
    assert refusal(path) == f"{path}: " + QUANTISED.format(f"it has 'layer{suffix}'")


def test_a_tensor_named_scale_is_no_quantisation(tmp_path):
    path = made.save_file(
        tmp_path / "x.safetensors", {"logit_scale": TENSORS["a"], "layer.weight": TENSORS["b"]}
    )
    assert set(names_and_values(path)) == {"logit_scale", "layer.weight"}


# Reading.


def test_every_dtype_is_read_as_torch_reads_it(tmp_path):
    torch.manual_seed(0)
    real = {
        str(d).split(".")[1]: torch.randn(3, 5).to(d)
        for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    whole = [
        torch.int64,
        torch.uint64,
        torch.int32,
        torch.uint32,
        torch.int16,
        torch.uint16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    integers = {str(d).split(".")[1]: torch.randint(0, 120, (3, 5)).to(d) for d in whole}
    scalar = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "complex": torch.randn(2, dtype=torch.complex64),
    }
    path = tmp_path / "x.safetensors"
    save_torch(real | integers | scalar, path)
    found = names_and_values(path)
    for name, values in (real | integers | scalar).items():
        expected = (values.float() if name in ("float16", "bfloat16") else values).numpy()
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_float8_is_read_as_torch_reads_it(tmp_path):
    path = tmp_path / "x.safetensors"
    values = {"w": torch.randn(3, 5).to(torch.float8_e4m3fn), "v": torch.randn(3, 5).to(torch.float8_e5m2)}
    save_torch(values, path)
    for name, found in names_and_values(path).items():
        np.testing.assert_array_equal(found, values[name].float().numpy())


def test_packed_values_are_not_read_as_numbers(tmp_path):
    path = tmp_path / "x.safetensors"
    save_torch({"w": torch.zeros(2, dtype=torch.float8_e8m0fnu)}, path)
    with open_model(path) as model, pytest.raises(ModelError) as caught:
        model.read("w")
    assert str(caught.value) == f"{path}: w: F8_E8M0 cannot be read as numbers, only copied."


def test_an_unknown_tensor_is_refused(tmp_path):
    path = made.save_file(tmp_path / "x.safetensors", TENSORS)
    with open_model(path) as model, pytest.raises(ModelError) as caught:
        model.read("z")
    assert str(caught.value) == f"{path}: has no tensor 'z'. `alnico inspect` lists the tensors."


def test_a_part_of_a_tensor_is_read(tmp_path):
    values = np.arange(1000, dtype=np.float32)
    path = made.save_file(
        tmp_path / "x.safetensors", {"before": TENSORS["c"], "w": ("F32", values), "zz": TENSORS["b"]}
    )
    buffer = bytearray(40)
    with open_model(path) as model:
        for offset in (0, 4, 398, 3960):
            model.read_into("w", offset, memoryview(buffer))
            assert buffer == values.tobytes()[offset : offset + 40]


def test_a_file_cut_while_it_is_read_is_an_error_of_the_run(tmp_path):
    path = made.save_file(tmp_path / "x.safetensors", {"w": TENSORS["a"]})
    size = path.stat().st_size
    with open_model(path) as model:
        model.read("w")
        with path.open("r+b") as file:
            file.truncate(size - 4)
        with pytest.raises(RunError) as caught:
            model.read("w")
    assert str(caught.value) == (
        f"{path}: w: the file ended at byte {size - 4}, expected 24 bytes at {size - 24}. "
        "It was changed while it was read; merge again from a complete file."
    )


def test_a_file_that_changed_between_its_header_and_its_first_tensor_is_refused(tmp_path):
    path = made.save_file(tmp_path / "x.safetensors", {"w": TENSORS["a"]})
    size = path.stat().st_size
    for change, how in (
        (lambda: os.truncate(path, size - 4), f"it had {size} bytes, now {size - 4}"),
        (lambda: os.utime(path, (1, 1)), "its modification time differs"),
    ):
        made.save_file(path, {"w": TENSORS["a"]})
        with open_model(path) as model:
            change()
            with pytest.raises(ModelError) as caught:
                model.read("w")
        assert str(caught.value) == (
            f"{path}: changed after its header was read ({how}); expected an unchanged file. "
            "Run the command again when nothing writes to the file."
        )


def test_the_identity_changes_with_the_header(tmp_path):
    a = made.save_file(tmp_path / "a.safetensors", {"w": TENSORS["a"]})
    b = made.save_file(tmp_path / "b.safetensors", {"v": TENSORS["a"]})
    with open_model(a) as first, open_model(b) as second:
        (one,), (other,) = first.identity(), second.identity()
    assert (one["file"], one["size"], one["mtime_ns"]) == (
        "a.safetensors",
        a.stat().st_size,
        a.stat().st_mtime_ns,
    )
    assert one["header"] != other["header"]


def test_more_files_than_may_be_open_are_read_by_threads(tmp_path):
    count = MAX_OPEN_FILES + 60
    tensors = {f"t{i:03d}": ("I64", np.full(8, i)) for i in range(count)}
    made.save_model(tmp_path, tensors, shards=count)
    order = np.random.default_rng(0).permutation(count * 4) % count
    with open_model(tmp_path) as model, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: model.read(f"t{i:03d}"), order))
    np.testing.assert_array_equal(found, np.repeat(order[:, None], 8, axis=1))
