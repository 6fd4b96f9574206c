"""How an output is cut, written, and what lies beside it."""

import errno
import json
import os
import stat

import numpy as np
import pytest
from safetensors.numpy import load_file

from alnico.checkpoint.shards import OutputShard, index_of, split_into_shards
from alnico.checkpoint.sidecars import copy_side_files, side_files, write_config
from alnico.checkpoint.writer import OutputFiles
from alnico.errors import RunError
from alnico.numerics.sizes import format_size, parse_size

# Sizes.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096 B", 4096),
        ("2k", 2000),
        ("5GB", 5 * 10**9),
        (" 2 gib ", 2 * 2**30),
        ("1.5KiB", 1536),
        ("3MiB", 3 * 2**20),
        ("7mb", 7 * 10**6),
        ("1TiB", 2**40),
        ("2t", 2 * 10**12),
        ("4.1GB", 4_100_000_000),  # in floating point 1 byte less
        ("9007199254740993", 2**53 + 1),
        ("1" + "0" * 400, 1 << 62),  # as good as all there is
    ],
)
def test_a_size_is_read_exactly(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0.1", "-1GB", "1 XB", "1e3", "1,5GB", "1.GB", "inf", "nan", "5 G B"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} is not a size; expected a number with a unit, such as 5GB or 2GiB"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (90_868_376, "90.9 MB"),
        (5e9, "5.0 GB"),
        (2e12, "2.0 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_a_size_is_written_for_people(size, text):
    assert format_size(size) == text


# Shards.


def names_in(shards) -> list[list[str]]:
    return [[t.name for t in s.header.tensors] for s in shards]


def test_a_shard_is_filled_to_its_limit_and_not_beyond():
    tensors = [
        (name, "F32", (n,)) for name, n in (("a", 2), ("b", 1), ("c", 1), ("d", 4), ("e", 1))
    ]  # 8, 4, 4, 16, 4 bytes
    assert names_in(split_into_shards(tensors, 16, None)) == [["a", "b", "c"], ["d"], ["e"]]
    assert names_in(split_into_shards(tensors, 15, None)) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [s.name for s in split_into_shards(tensors, 16, None)] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_a_tensor_above_the_limit_is_alone_and_its_neighbours_stay_together():
    tensors = [("a", "F32", (1,)), ("big", "F32", (100,)), ("b", "F32", (1,)), ("c", "F32", (1,))]
    assert names_in(split_into_shards(tensors, 8, None)) == [["a"], ["big"], ["b", "c"]]
    assert names_in(split_into_shards(tensors[1:], 8, None)) == [["big"], ["b", "c"]]


def test_what_fits_is_one_file():
    tensors = [("a", "F32", (2,)), ("b", "BF16", (4,))]
    assert [s.name for s in split_into_shards(tensors, 16, None)] == ["model.safetensors"]
    assert [s.name for s in split_into_shards(tensors, 1, "one.safetensors")] == ["one.safetensors"]
    assert [s.name for s in split_into_shards([], 16, None)] == ["model.safetensors"]


def test_every_tensor_begins_at_a_multiple_of_its_element_size():
    random = np.random.default_rng(0)
    width = {"F64": 8, "F32": 4, "BF16": 2, "I64": 8, "BOOL": 1, "U8": 1, "I32": 4}
    tensors = [(f"t{i}", str(random.choice(list(width))), (int(random.integers(1, 9)),)) for i in range(60)]
    shards = split_into_shards(tensors, 200, None)
    assert len(shards) > 3
    for t in (t for s in shards for t in s.header.tensors):
        assert t.begin % width[t.dtype] == 0
    assert sorted(n for group in names_in(shards) for n in group) == sorted(t[0] for t in tensors)


def test_the_index_says_where_each_tensor_is():
    shards = split_into_shards([("b", "F32", (2,)), ("a", "BF16", (4,)), ("c", "I64", (1,))], 16, None)
    name, text = index_of(shards)
    assert name == "model.safetensors.index.json"
    assert json.loads(text) == {
        "metadata": {"total_size": 24},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }


# Writing.

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(3, dtype=np.float64),
    "c": np.array([1, 2], np.int64),
}
DTYPES = {"a": "F32", "b": "F64", "c": "I64"}


def shards_of_arrays(limit: int) -> tuple[OutputShard, ...]:
    return split_into_shards([(n, DTYPES[n], v.shape) for n, v in ARRAYS.items()], limit, None)


def write_all(files: OutputFiles) -> None:
    for name, values in ARRAYS.items():
        data = memoryview(values.tobytes())
        for offset in range(0, len(data), 8):  # in parts, the last first
            place = len(data) - 8 - offset
            files.write(name, place, data[place : place + 8])


def check_arrays(directory, shards) -> None:
    found = {}
    for shard in shards:
        assert (directory / shard.name).stat().st_size == shard.byte_size
        found |= load_file(directory / shard.name)
    assert set(found) == set(ARRAYS)
    for name, values in ARRAYS.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("limit", [10**9, 24])
def test_what_is_written_in_parts_is_read_by_the_safetensors_package(tmp_path, limit):
    shards = shards_of_arrays(limit)
    files = OutputFiles(tmp_path, shards)
    write_all(files)
    files.sync()
    back = bytearray(8)
    files.read_into("a", 8, memoryview(back))
    assert back == ARRAYS["a"].tobytes()[8:16]
    files.finish()
    files.close()
    check_arrays(tmp_path, shards)


def test_nothing_has_the_name_of_a_model_before_the_end(tmp_path):
    shards = shards_of_arrays(24)
    files = OutputFiles(tmp_path, shards)
    write_all(files)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(s.name + ".unfinished" for s in shards)
    files.finish()
    files.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(s.name for s in shards)


def test_an_interrupted_output_is_taken_up_as_it_lies(tmp_path):
    shards = shards_of_arrays(24)
    first = OutputFiles(tmp_path, shards)
    write_all(first)
    os.replace(first.path(shards[0].name), tmp_path / shards[0].name)  # killed in the middle of finish
    first.close()
    again = OutputFiles(tmp_path, shards)
    again.finish()
    again.close()
    check_arrays(tmp_path, shards)


def test_a_file_of_another_size_is_cut_to_size(tmp_path):
    shards = shards_of_arrays(10**9)
    (tmp_path / "model.safetensors.unfinished").write_bytes(bytes(10_000))
    files = OutputFiles(tmp_path, shards)
    write_all(files)
    files.finish()
    files.close()
    check_arrays(tmp_path, shards)


def test_output_files_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        OutputFiles(tmp_path, shards_of_arrays(10**9)).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors.unfinished").stat().st_mode) == 0o644


def fail(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def test_an_output_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    shards = shards_of_arrays(10**9)
    with pytest.raises(RunError) as caught:
        OutputFiles(tmp_path / "none", shards)
    path = tmp_path / "none" / "model.safetensors.unfinished"
    assert (
        str(caught.value)
        == f"{path}: cannot be created (No such file or directory). Choose another output directory."
    )
    monkeypatch.setattr(os, "ftruncate", fail(errno.ENOSPC))
    with pytest.raises(RunError) as caught:
        OutputFiles(tmp_path, shards)
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors.unfinished: {shards[0].byte_size} bytes could not be written (No space left on device). "
        "Make room; the same command resumes the merge."
    )


def test_data_that_does_not_reach_the_disk_is_an_error(tmp_path, monkeypatch):
    files = OutputFiles(tmp_path, shards_of_arrays(10**9))
    monkeypatch.setattr(os, "fdatasync", fail(errno.EIO))
    with pytest.raises(RunError) as caught:
        files.sync()
    files.close()
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors.unfinished: could not be flushed to disk (Input/output error). "
        "Check the disk; the same command resumes the merge."
    )


# Side files.


def fill(directory, *names) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"text of {name}")


CARRIED = [
    "LICENSE",
    "chat_template.jinja",
    "generation_config.json",
    "modeling_own.py",
    "tokenizer.json",
    "vocab.txt",
]
WEIGHTS = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
LEFT = [
    "consolidated.safetensors",
    "model.onnx",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "x.gguf",
]
WRITTEN_NEW = ["README.md", "alnico.lock.json", "config.json", "mergekit_config.yml"]
NEVER = [".gitattributes", "__pycache__/a.pyc"]


def test_side_files_are_carried_and_the_rest_is_named(tmp_path):
    fill(tmp_path, *CARRIED, *WEIGHTS, *LEFT, *WRITTEN_NEW, *NEVER, "onnx/model.onnx", "runs/log")
    carried, left = side_files(tmp_path)
    assert [str(p) for p in carried] == CARRIED
    assert sorted(str(p) for p in left) == sorted([*LEFT, "onnx", "runs"])


def test_the_modules_of_sentence_transformers_are_carried_but_for_weights(tmp_path):
    modules = [
        {"path": ""},
        {"path": "1_Pooling"},
        {"path": "2_Dense"},
        {"path": "../outside"},
        {"path": ".."},
        {},
    ]
    fill(
        tmp_path / "m",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/deep/x",
        "3_Other/x",
        "../outside/x",
    )
    fill(
        tmp_path / "m",
        "2_Dense/model.safetensors.index.json",
        "2_Dense/onnx/model.onnx",
        "adapter_config.json",
    )
    (tmp_path / "m" / "modules.json").write_text(json.dumps(modules))
    carried, left = side_files(tmp_path / "m")
    assert [str(p) for p in carried] == ["1_Pooling/config.json", "2_Dense/deep/x", "modules.json"]
    weights = ["2_Dense/model.safetensors", "2_Dense/model.safetensors.index.json", "2_Dense/onnx/model.onnx"]
    assert [str(p) for p in left] == [*weights, "3_Other", "adapter_config.json"]
    (tmp_path / "out").mkdir()
    copy_side_files(tmp_path / "m", tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "deep" / "x").read_text() == "text of 2_Dense/deep/x"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1_Pooling", "2_Dense", "modules.json"]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": 1}', "[" * 100_000, "null"], ids=["cut", "number", "object", "nested", "null"]
)
def test_damaged_modules_carry_no_folder(tmp_path, text):
    fill(tmp_path, "1_Pooling/config.json")
    (tmp_path / "modules.json").write_text(text)
    carried, left = side_files(tmp_path)
    assert ([str(p) for p in carried], [str(p) for p in left]) == (["modules.json"], ["1_Pooling"])


def test_a_side_file_that_cannot_be_carried_says_why(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").symlink_to("none")
    with pytest.raises(RunError) as caught:
        copy_side_files(tmp_path / "m", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/m/tokenizer.json: could not be copied to the output (No such file or directory). "
        "Make room or repair the file; the same command resumes the merge."
    )


# The config.


def rewritten(tmp_path, config, dtype) -> bytes:
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    write_config(tmp_path / "m", config, dtype, tmp_path)
    return (tmp_path / "config.json").read_bytes()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_config_names_the_new_dtype(tmp_path, key):
    config = {"model_type": "llama", key: "float32", "name": "é"}
    assert json.loads(rewritten(tmp_path, config, "BF16")) == config | {key: "bfloat16"}
    assert json.loads(rewritten(tmp_path, config, "F16")) == config | {key: "float16"}


def test_a_config_without_a_dtype_gets_one_unless_it_is_the_default(tmp_path):
    assert json.loads(rewritten(tmp_path, {"a": 1}, "BF16")) == {"a": 1, "torch_dtype": "bfloat16"}
    assert json.loads(rewritten(tmp_path, {"a": 1}, "F32")) == {"a": 1}


@pytest.mark.parametrize("dtype", ["BF16", None, "I64"])
def test_a_config_that_needs_no_change_is_carried_byte_for_byte(tmp_path, dtype):
    (tmp_path / "m").mkdir()
    text = b'{"torch_dtype":   "bfloat16",\r\n"a": 1e1}'
    (tmp_path / "m" / "config.json").write_bytes(text)
    write_config(tmp_path / "m", json.loads(text), dtype, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == text


def test_no_config_is_made_up(tmp_path):
    (tmp_path / "m").mkdir()
    write_config(tmp_path / "m", {}, "BF16", tmp_path)
    assert not (tmp_path / "config.json").exists()
