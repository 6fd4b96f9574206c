"""Every way a header can lie is refused by its own message; the safetensors package is the referee of the rest."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import TensorSpec, deserialize, serialize

from alnico.checkpoint.header import MAX_HEADER_BYTES, build, parse, parse_length
from alnico.errors import ModelError

LIES = "The header is wrong; get the file from its source."


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets),
    }


def parse_text(text: bytes, data_bytes: int = 4):
    return parse(text, 8 + len(text) + data_bytes, "f")


def parse_entries(entries, data_bytes: int = 4):
    return parse_text(json.dumps(entries).encode(), data_bytes)


def refusal(call, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    return str(caught.value)


# The length.


def test_a_file_shorter_than_its_length_field_is_refused():
    assert refusal(parse_length, b"\x01\0\0", 3, "f") == (
        "f: the file has 3 bytes; a safetensors file begins with an 8-byte header length. "
        "The file is truncated or not safetensors; download it again."
    )


def test_a_header_above_the_limit_of_the_format_is_refused_before_it_is_read():
    size = 10**9
    assert parse_length((MAX_HEADER_BYTES).to_bytes(8, "little"), size, "f") == 100_000_000
    assert refusal(parse_length, (100_000_001).to_bytes(8, "little"), size, "f") == (
        "f: the header claims 100000001 bytes; at most 100000000 are allowed. "
        "The file is damaged or not safetensors; download it again."
    )


def test_a_header_longer_than_the_file_is_refused():
    assert parse_length((92).to_bytes(8, "little"), 100, "f") == 92
    assert refusal(parse_length, (93).to_bytes(8, "little"), 100, "f") == (
        "f: the header claims 93 bytes, the file has 100. The file is truncated; download it again."
    )


# The JSON.


def test_a_header_that_does_not_begin_with_a_brace_is_refused():
    expected = "f: the header begins with {}, expected '{{'. The file is not safetensors."
    assert refusal(parse_text, b" {}", 0) == expected.format("b' '")
    assert refusal(parse_text, b"[1]", 0) == expected.format("b'['")
    assert refusal(parse_text, b"", 0) == expected.format("b''")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            b"{",
            "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (b"{}{}", "JSONDecodeError: Extra data: line 1 column 3 (char 2)"),
        (
            b'{"\xff": 1}',
            "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 2: invalid start byte",
        ),
        (b'{"a":' * 100_000, "RecursionError: maximum recursion depth exceeded"),
    ],
    ids=["cut", "two values", "no UTF-8", "deeply nested"],
)
def test_a_header_that_is_not_json_is_refused(text, reason):
    message = refusal(parse_text, text, 0)
    assert message.startswith(f"f: the header is not JSON ({reason}")
    assert message.endswith("). The file is damaged or not safetensors.")


@pytest.mark.parametrize("place", ["entry", "dtype", "shape", "data_offsets", "__metadata__"])
def test_no_depth_of_nesting_crashes(place):
    for depth in (10, *range(900, 1010, 3)):
        deep = "[" * depth + "]" * depth
        parts = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | {place: deep}
        inner = (
            deep
            if place in ("entry", "__metadata__")
            else "{" + ",".join(f'"{k}":{v}' for k, v in parts.items()) + "}"
        )
        refusal(parse_text, f'{{"{place if place == "__metadata__" else "w"}":{inner}}}'.encode())


def test_a_name_given_twice_is_refused():
    one = json.dumps(entry())
    expected = "f: the header names {!r} twice; names must be unique. " + LIES
    assert refusal(parse_text, f'{{"w":{one},"w":{one}}}'.encode()) == expected.format("w")
    twice = '{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    assert refusal(parse_text, twice.encode()) == expected.format("dtype")


@pytest.mark.parametrize("metadata", [{"format": 1}, {"format": None}, ["pt"], None], ids=str)
def test_metadata_that_maps_no_strings_to_strings_is_refused(metadata):
    message = "f: __metadata__ must map strings to strings. Get the file from its source."
    assert refusal(parse_entries, {"__metadata__": metadata, "w": entry()}) == message


def test_a_name_that_is_no_unicode_text_is_refused():
    message = "f: 'w\\ud800' is an unpaired surrogate; expected Unicode text. Get the file from its source."
    assert refusal(parse_entries, {"w\ud800": entry()}) == message
    assert refusal(parse_entries, {"__metadata__": {"a": "w\ud800"}, "w": entry()}) == message
    assert refusal(parse_entries, {"__metadata__": {"w\ud800": "a"}, "w": entry()}) == message
    assert (
        parse_entries({"w\U0001f9f2": entry()}).tensors[0].name == "w\U0001f9f2"
    )  # json.dumps writes it as two halves


# The entries.


def test_an_entry_with_a_key_missing_is_refused():
    assert refusal(parse_entries, {"w": {"dtype": "F32", "shape": [1]}}) == (
        f"f: tensor 'w' has the keys ['dtype', 'shape']; expected dtype, shape and data_offsets. {LIES}"
    )


def test_an_entry_with_an_unknown_key_is_refused():
    assert refusal(parse_entries, {"w": entry() | {"strides": [1]}}) == (
        f"f: tensor 'w' has the keys ['data_offsets', 'dtype', 'shape', 'strides']; expected dtype, shape and data_offsets. {LIES}"
    )


def test_an_entry_that_is_no_object_is_refused():
    assert refusal(parse_entries, {"w": [0, 4]}) == (
        f"f: tensor 'w' has a list as its entry; expected dtype, shape and data_offsets. {LIES}"
    )


@pytest.mark.parametrize("dtype", ["F33", "f32", "", None, 4, ["F32"], {}], ids=str)
def test_an_unknown_dtype_is_named_with_the_known_ones(dtype):
    assert refusal(parse_entries, {"w": entry(dtype=dtype)}) == (
        f"f: tensor 'w' has the unknown dtype {dtype!r}; known are F64, F32, F16, BF16, I64, U64, I32, U32, I16, U16, I8, U8, "
        "BOOL, C64, F8_E5M2, F8_E4M3, F8_E5M2FNUZ, F8_E4M3FNUZ, F8_E8M0, F6_E2M3, F6_E3M2, F4. A newer alnico may know it."
    )


@pytest.mark.parametrize("size", [-1, True, 1.0, "1", None, 1 << 63], ids=str)
def test_a_size_that_is_no_count_is_refused(size):
    assert refusal(parse_entries, {"w": entry(shape=[1, size])}) == (
        f"f: tensor 'w' has the shape {[1, size]}; expected a list of at most 64 sizes, none negative. {LIES}"
    )


@pytest.mark.parametrize("shape", [1, "1", None, {}], ids=str)
def test_a_shape_that_is_no_list_is_refused(shape):
    assert refusal(parse_entries, {"w": entry(shape=shape)}) == (
        f"f: tensor 'w' has the shape {shape}; expected a list of at most 64 sizes, none negative. {LIES}"
    )


def test_too_many_dimensions_are_refused():
    assert parse_entries({"w": entry(shape=[1] * 64)}).tensors[0].shape == (1,) * 64
    found = str([1] * 65)[:80]
    assert refusal(parse_entries, {"w": entry(shape=[1] * 65)}) == (
        f"f: tensor 'w' has the shape {found}; expected a list of at most 64 sizes, none negative. {LIES}"
    )


@pytest.mark.parametrize(
    "offsets", [[-4, 0], [0, 4.0], [False, 4], [0, 1 << 63], [0], [0, 4, 8], [], None, "04", {}], ids=str
)
def test_offsets_that_are_not_two_positions_are_refused(offsets):
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    assert refusal(parse_text, text) == (
        f"f: tensor 'w' has the data_offsets {offsets}; expected two byte positions, none negative. {LIES}"
    )


def test_an_end_before_the_begin_is_refused():
    assert refusal(parse_entries, {"w": entry(shape=(0,), offsets=(4, 0))}) == (
        f"f: tensor 'w' has the data_offsets [4, 0]; expected an end not before the begin. {LIES}"
    )


def test_a_tensor_that_ends_after_the_file_is_refused():
    text = json.dumps({"w": entry(shape=(2,), offsets=(0, 8))}).encode()
    end = 8 + len(text) + 8
    assert parse_text(text, 8).tensors[0].end == end
    assert refusal(parse_text, text, 7) == (
        f"f: tensor 'w' ends at byte {end}, the file has {end - 1}. The file is truncated; download it again."
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("F32", (2,), "8 bytes for shape (2,) of F32"),
        ("F32", (), "4 bytes for shape () of F32"),
        ("BF16", (3, 0), "0 bytes for shape (3, 0) of BF16"),
        ("F64", (1_234_567,), "9876536 bytes for shape (1234567,) of F64"),
        ("F4", (5,), "20 bits, which are not whole bytes, for shape (5,) of F4"),
        ("F4", (3,), "12 bits, which are not whole bytes, for shape (3,) of F4"),
    ],
)
def test_a_size_that_is_not_shape_times_dtype_is_refused(dtype, shape, expected):
    offsets = (0, 1) if dtype == "F4" and shape == (3,) else (0, 2)
    assert refusal(parse_entries, {"w": entry(dtype, shape, offsets)}, offsets[1]) == (
        f"f: tensor 'w' has {offsets[1]} bytes; expected {expected}. {LIES}"
    )


def test_a_shape_whose_product_no_machine_number_holds_is_refused():
    message = refusal(parse_entries, {"w": entry(shape=[(1 << 63) - 1] * 64)})
    assert message.startswith("f: tensor 'w' has 4 bytes; expected ")
    assert len(message) < 400


# The layout.


def test_an_overlap_is_refused():
    assert refusal(
        parse_entries, {"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(offsets=(4, 8))}, 8
    ) == (
        f"f: tensors 'a' and 'b' overlap at byte 4 of the data; each byte must belong to one tensor. {LIES}"
    )
    assert refusal(parse_entries, {"a": entry(), "b": entry()}) == (
        f"f: tensors 'a' and 'b' overlap at byte 0 of the data; each byte must belong to one tensor. {LIES}"
    )


def test_a_gap_is_refused():
    gap = (
        f"f: bytes {{}} to {{}} of the data, before {{!r}}, belong to no tensor; gaps are not allowed. {LIES}"
    )
    middle = {"a": entry(), "b": entry(offsets=(8, 12))}
    assert refusal(parse_entries, middle, 12) == gap.format(4, 8, "b")
    assert refusal(parse_entries, {"a": entry(offsets=(4, 8))}, 8) == gap.format(0, 4, "a")


def test_bytes_after_the_last_tensor_are_refused():
    text = json.dumps({"w": entry()}).encode()
    end = 8 + len(text) + 4
    assert refusal(parse_text, text, 6) == (
        f"f: the tensors end at byte {end}, the file at byte {end + 2}; they must end together. "
        "The file is damaged; download it again."
    )


def test_tensors_come_in_the_order_of_their_bytes():
    header = parse_entries(
        {"b": entry(offsets=(4, 8)), "c": entry(shape=(0,), offsets=(4, 4)), "a": entry()}, 8
    )
    assert [t.name for t in header.tensors] == ["a", "c", "b"]
    assert [t.begin - header.data_begin for t in header.tensors] == [0, 4, 4]


# The safetensors package as referee.

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16,
        "I8": 8, "U8": 8, "BOOL": 8, "F8_E5M2": 8, "F8_E4M3": 8}  # fmt: skip
TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U64": "uint64", "I32": "int32",
         "U32": "uint32", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E5M2": "float8_e5m2",
         "F8_E4M3": "float8_e4m3fn"}  # fmt: skip

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
models = st.dictionaries(names, st.tuples(st.sampled_from(sorted(BITS)), shapes), max_size=6)
metadatas = st.none() | st.dictionaries(
    names, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=3
)  # of {} the package makes no JSON


def contents(model, seed: int = 0) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    return {
        name: random.bytes(int(np.prod(shape, dtype=int)) * BITS[dtype] // 8)
        for name, (dtype, shape) in model.items()
    }


def written(model, data: dict[str, bytes], metadata=None) -> bytes:
    """A file by the safetensors package, which wants addresses of buffers."""
    buffers = {name: np.frombuffer(raw or b" ", np.uint8) for name, raw in data.items()}
    specs = {
        name: TensorSpec(
            dtype=TORCH[dtype], shape=shape, data_ptr=buffers[name].ctypes.data, data_len=len(data[name])
        )
        for name, (dtype, shape) in model.items()
    }
    return bytes(serialize(specs, metadata))


@settings(max_examples=150, deadline=None)
@given(models, metadatas)
def test_what_the_safetensors_package_writes_is_read_the_same(model, metadata):
    data = contents(model)
    file = written(model, data, metadata)
    length = parse_length(file[:8], len(file), "f")
    header = parse(file[8 : 8 + length], len(file), "f")
    assert {t.name: (t.dtype, t.shape) for t in header.tensors} == model
    assert {t.name: file[t.begin : t.end] for t in header.tensors} == data
    assert dict(header.metadata) == (metadata or {})


@settings(max_examples=150, deadline=None)
@given(models, metadatas)
def test_the_safetensors_package_reads_what_is_built_the_same(model, metadata):
    data = contents(model)
    start, header = build([(n, d, s) for n, (d, s) in model.items()], metadata or {})
    file = start + b"".join(data.values())
    found = deserialize(file)
    assert {n: (e["dtype"], tuple(e["shape"])) for n, e in found} == model
    assert {n: bytes(e["data"]) for n, e in found} == data
    assert {t.name: file[t.begin : t.end] for t in header.tensors} == data
    assert header.data_begin == len(start)
    assert len(start) % 8 == 0


GOOD = written(
    {"a": ("F32", (2, 3)), "b": ("BF16", (5,))}, {"a": bytes(24), "b": bytes(10)}, {"format": "pt"}
)


def survives(file: bytes) -> None:
    try:
        length = parse_length(file[:8], len(file), "f")
        header = parse(file[8 : 8 + length], len(file), "f")
    except ModelError:
        return
    assert all(8 + length <= t.begin <= t.end <= len(file) for t in header.tensors)
    assert sum(t.byte_size for t in header.tensors) == len(file) - 8 - length


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused_or_read_but_never_crash(data, with_length):
    survives(len(data).to_bytes(8, "little") + data if with_length else data)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4), st.integers(0, 12)
)
def test_a_mutated_file_is_refused_or_read_but_never_crashes(changes, cut):
    file = bytearray(GOOD)
    for place, value in changes:
        file[place] = value
    survives(bytes(file[: len(file) - cut]))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "w", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner)
    ),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["w", "v", "__metadata__"]),
        st.fixed_dictionaries({"dtype": values, "shape": values, "data_offsets": values}) | values,
    )
)
def test_any_json_is_refused_or_read_but_never_crashes(entries):
    text = json.dumps(entries).encode()
    survives(len(text).to_bytes(8, "little") + text + bytes(4))


def test_messages_name_the_file():
    with pytest.raises(ModelError, match=re.escape("/models/a.safetensors: the header begins with b''")):
        parse(b"", 8, "/models/a.safetensors")
