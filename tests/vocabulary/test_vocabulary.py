"""Vocabularies are read as data and compared by rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alnico.errors import ModelError
from alnico.vocabulary import tokenizer as tokenizers
from alnico.vocabulary.compare import (
    Vocabulary,
    count_renamed,
    difference,
    read_vocabulary,
    rows_differ_message,
    same_files,
    unread_file,
    vocabularies_differ_message,
)

TOKENS = {"<s>": 0, "a": 1, "b": 2, "ab": 3}
ADDED = [{"id": 0, "content": "<s>", "special": True}, {"id": 4, "content": "<pad>", "special": True}]


def tokenizer(folder: Path, model: Any, added: Any = ADDED) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": added, "model": model})
    )
    return folder


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": TOKENS, "merges": [["a", "b"]]},
        {"type": "WordPiece", "vocab": TOKENS, "unk_token": "[UNK]"},
        {"type": "Unigram", "vocab": [["<s>", 0.0], ["a", -1.5], ["b", -2.0], ["ab", -2.5]]},
    ],
    ids=lambda m: m["type"],
)
def test_every_kind_of_tokenizer_json_gives_tokens_and_rows(tmp_path: Path, model: dict[str, Any]) -> None:
    vocabulary = read_vocabulary(tokenizer(tmp_path, model))
    assert vocabulary == Vocabulary({"a": 1, "b": 2, "ab": 3}, {"<s>": 0, "<pad>": 4})
    assert vocabulary.size == 5


def test_vocab_json_gives_tokens_and_rows(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(TOKENS))
    assert read_vocabulary(tmp_path) == Vocabulary(TOKENS, {})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_vocab_txt_has_a_token_a_line(tmp_path: Path, end: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(end.join(["[PAD]", "a", "##b", "é", ""]).encode())
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary == Vocabulary({"[PAD]": 0, "a": 1, "##b": 2, "é": 3}, {})
    assert vocabulary.size == 4


def test_tokenizer_json_goes_before_vocab_json_before_vocab_txt(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("x\n")
    assert read_vocabulary(tmp_path) == Vocabulary({"x": 0}, {})
    (tmp_path / "vocab.json").write_text('{"y": 0}')
    assert read_vocabulary(tmp_path) == Vocabulary({"y": 0}, {})
    tokenizer(tmp_path, {"type": "BPE", "vocab": {"z": 0}}, [])
    assert read_vocabulary(tmp_path) == Vocabulary({"z": 0}, {})


def test_a_model_without_a_readable_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(None) is None
    assert read_vocabulary(tmp_path) is None
    (tmp_path / "tekken.json").write_bytes(b"{}")
    assert read_vocabulary(tmp_path) is None
    tokenizer(tmp_path, {"type": "Quantum"})
    assert read_vocabulary(tmp_path) is None
    tokenizer(tmp_path, None)
    assert read_vocabulary(tmp_path) is None


def test_an_empty_vocabulary_has_size_0() -> None:
    assert Vocabulary({}, {}).size == 0


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tokenizer.json", "{", "is not JSON"),
        ("tokenizer.json", "[]", "holds a JSON list, expected an object"),
        (
            "tokenizer.json",
            '{"model": {"vocab": {"a": "b"}}}',
            "its vocabulary maps tokens to values that are not row numbers.",
        ),
        (
            "tokenizer.json",
            '{"model": {"vocab": {"a": true}}}',
            "its vocabulary maps tokens to values that are not row numbers.",
        ),
        (
            "tokenizer.json",
            '{"model": {"vocab": [1, 2]}}',
            "model.vocab has entries that are not [token, score].",
        ),
        (
            "tokenizer.json",
            '{"model": {"vocab": [{}]}}',
            "model.vocab has entries that are not [token, score].",
        ),
        (
            "tokenizer.json",
            '{"model": {"vocab": [[]]}}',
            "model.vocab has entries that are not [token, score].",
        ),
        (
            "tokenizer.json",
            '{"model": {"vocab": {}}, "added_tokens": [{}]}',
            "added_tokens has entries without content or without an id up to 4194303.",
        ),
        (
            "tokenizer.json",
            '{"model": {"vocab": {}}, "added_tokens": 5}',
            "added_tokens has entries without content or without an id up to 4194303.",
        ),
        (
            "tokenizer.json",
            '{"model": {"vocab": {}}, "added_tokens": [{"content": "a", "id": 1e999}]}',
            "added_tokens has entries without content or without an id up to 4194303.",
        ),
        ("tokenizer.model", "\n\x05ab", "is not a sentencepiece model (it ends inside a field)."),
        ("tokenizer.model", "\n\x03\n\x01\udcff", "is not a sentencepiece model (a piece is not UTF-8)."),
        ("tokenizer.model", "", "is not a sentencepiece model (it has no pieces)."),
        ("tokenizer.model", "\n\x02\x10\x01", "is not a sentencepiece model (piece 0 has no text)."),
        ("tokenizer.model", "\x08\x01", "is not a sentencepiece model (a piece is not a message)."),
        ("tokenizer.model", "\x0f", "is not a sentencepiece model (no field begins at byte 1)."),
        ("tokenizer.model", "\x12", "is not a sentencepiece model (it ends inside a number)."),
        ("vocab.json", '{"a": 1.5}', "its vocabulary maps tokens to values that are not row numbers."),
        ("vocab.json", "not json", "is not JSON"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ModelError) as caught:
        read_vocabulary(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {expected}")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_a_folder_in_the_place_of_a_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for read in (lambda: read_vocabulary(tmp_path), lambda: same_files(tmp_path, tmp_path)):
        with pytest.raises(ModelError) as caught:
            read()
        assert (
            str(caught.value)
            == f"{tmp_path / name}: is a folder, a pipe or a device; expected a regular file. Check the path."
        )


def test_a_file_too_large_for_a_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "MAX_BYTES", 10)
    (tmp_path / "vocab.txt").write_text("a\n" * 6)
    with pytest.raises(ModelError) as caught:
        read_vocabulary(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path / 'vocab.txt'}: is larger than 10 bytes; expected a tokenizer. Check the model."
    )


def test_equal_vocabularies_do_not_differ_whatever_their_order() -> None:
    one, other = Vocabulary({"a": 0, "b": 1}, {"<s>": 2}), Vocabulary({"b": 1, "a": 0}, {"<s>": 2})
    assert difference(one, other) is None
    assert count_renamed(one, other) == 0


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "c": 1}, "2 of 3 tokens differ, such as 'b' at row 1"),
        ({"a": 0, "b": 1}, {"a": 0, "x": 1}, "1 of 2 tokens differ, such as 'b' at row 1"),
        ({"a": 0}, {"a": 0, "b": 1, "c": 2}, "2 of 3 tokens differ, such as 'b' at row 1"),
        ({"a": 0, "b": 1}, {"a": 0}, "1 of 2 tokens differ, such as 'b' at row 1"),
    ],
)
def test_tokens_in_other_rows_and_tokens_of_one_model_are_counted_by_row(
    one: dict[str, int], other: dict[str, int], expected: str
) -> None:
    assert difference(Vocabulary(one, {}), Vocabulary(other, {})) == expected


def test_added_tokens_may_be_renamed_and_are_counted_apart() -> None:
    one = Vocabulary({"a": 0, "b": 1}, {"<s>": 2, "<unused0>": 3})
    other = Vocabulary({"a": 0, "b": 1}, {"<s>": 2, "<tool>": 3})
    assert difference(one, other) is None
    assert count_renamed(one, other) == 1


def test_a_token_that_one_model_calls_added_is_the_same_token() -> None:
    assert difference(Vocabulary({"a": 0, "b": 1}, {}), Vocabulary({"a": 0}, {"b": 1})) is None
    assert difference(Vocabulary({"a": 0}, {"b": 1}), Vocabulary({"a": 0, "b": 1}, {})) is None


def test_the_same_bytes_need_no_reading(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("not even JSON")
    assert same_files(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "tokenizer.json").write_text("other  JSON.")
    assert not same_files(tmp_path / "one", tmp_path / "two")
    assert not same_files(None, tmp_path)
    assert not same_files(tmp_path, tmp_path)


def test_a_tokenizer_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert unread_file(None) is None
    assert unread_file(tmp_path) is None
    (tmp_path / "tekken.json").write_bytes(b"")
    assert unread_file(tmp_path) == "tekken.json"
    (tmp_path / "vocab.txt").write_text("a")
    assert unread_file(tmp_path) is None


def piece(text: str, score: bytes = b"\x15\x00\x00\x80\xbf", kind: bytes = b"\x18\x02") -> bytes:
    """A piece of a sentencepiece model with its text, score and type, as the format has it."""
    data = text.encode()
    message = b"\x0a" + bytes([len(data)]) + data + score + kind
    return b"\x0a" + bytes([len(message)]) + message


def test_a_sentencepiece_model_gives_pieces_by_their_places(tmp_path: Path) -> None:
    trainer = b"\x12\x04\x20\x80\x80\x02" + b"\x19" + bytes(8)  # other fields: bytes and 64 bits
    long = "▁" * 40  # 120 bytes: the lengths need two bytes
    message = b"\x0a\x78" + long.encode()
    two = (
        b"\x0a" + bytes([len(message) | 0x80, 0])[:1] + b"\x00"
        if len(message) > 127
        else b"\x0a" + bytes([len(message)])
    )
    (tmp_path / "tokenizer.model").write_bytes(piece("<unk>") + trainer + piece("▁a") + two + message)
    assert read_vocabulary(tmp_path) == Vocabulary({"<unk>": 0, "▁a": 1, long: 2}, {})


def test_added_tokens_have_the_ids_that_the_library_gives_and_not_those_of_the_file(tmp_path: Path) -> None:
    added = [{"id": 9, "content": "<x>"}, {"id": 7, "content": "<y>"}]
    assert read_vocabulary(
        tokenizer(tmp_path, {"type": "BPE", "vocab": {"a": 0, "b": 1}}, added)
    ) == Vocabulary({"a": 0, "b": 1}, {"<x>": 2, "<y>": 3})


def test_different_vocabularies_say_what_to_write() -> None:
    assert vocabularies_differ_message("a", "b", "1 of 2 tokens differ, such as 'x' at row 1") == (
        "a and b have different vocabularies: 1 of 2 tokens differ, such as 'x' at row 1; expected one. "
        "Write tokenizer_source: base for the vocabulary of a, tokenizer_source: union for the tokens of all models, "
        "or use models with the same tokenizer."
    )


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [
        (None, None, "the models have different vocabularies, expected one. Write tokenizer_source: base for the vocabulary of a, "
         "tokenizer_source: union for the tokens of all models, or use models with the same tokenizer."),
        (151936, 151665, "the other rows are padding, expected one number of rows. Write tokenizer: {source: base, pad_to_multiple_of: 1187}, "
         "which pads to 151936 again, or use models of one size."),
        (151665, 151665, "the other rows are padding, expected one number of rows. Write tokenizer: {source: base}, or use models of one size."),
    ],
)  # fmt: skip
def test_different_numbers_of_rows_say_what_to_write(
    rows: int | None, size: int | None, expected: str
) -> None:
    message = rows_differ_message("embed", "a", rows or 8, "b", 9, size)
    assert message.startswith(f"embed: a has {rows or 8} rows, b has 9")
    assert message.endswith(expected)
