"""Tokens of any kind of tokenizer are known by the bytes of text that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alnico.vocabulary.token_pieces import TokenPieces
from alnico.vocabulary.token_texts import TokenTexts, byte_characters, shared_tokens
from alnico.vocabulary.tokenizer import read_tokenizer
from made_tokenizers import entry, save_tokenizer

BYTES = {value: character for character, value in byte_characters().items()}


def as_bytes(text: str) -> str:
    """A text as a byte-level BPE writes it."""
    return "".join(BYTES[b] for b in text.encode())


def texts(folder: Path, rows: int = 10_000) -> TokenTexts:
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    return TokenTexts(tokenizer, rows)


WORDS = ["a", "b", "ab", " a", " ab", "é", "日", "\n"]
LEVEL = {"pre_tokenizer": {"type": "ByteLevel"}}


def vocabulary(words: list[str]) -> dict[str, int]:
    return {word: row for row, word in enumerate(words)}


def byte_level(folder: Path, words: list[str], **keys: Any) -> Path:
    save_tokenizer(folder, vocabulary([as_bytes(w) for w in words]), **keys)
    return with_document(folder, pre_tokenizer={"type": "ByteLevel"})


def with_document(folder: Path, **parts: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return folder


def test_every_kind_of_token_stands_for_the_same_bytes(tmp_path: Path) -> None:
    level = texts(byte_level(tmp_path / "bytes", WORDS))
    pieces = [w.replace(" ", "▁") for w in WORDS]
    pieced = texts(save_tokenizer(tmp_path / "pieces", vocabulary(pieces), model={"byte_fallback": True}))
    plain = texts(save_tokenizer(tmp_path / "plain", vocabulary(WORDS)))
    expected = {word.encode(): row for row, word in enumerate(WORDS)}
    assert [t.kind for t in (level, pieced, plain)] == ["bytes", "pieces", "plain"]
    assert level.by_text == pieced.by_text == plain.by_text == expected
    words = texts(
        save_tokenizer(tmp_path / "words", vocabulary(["a", "##a", "ab", "##é"]), model={"type": "WordPiece"})
    )
    assert (words.kind, words.by_text) == ("words", {b" a": 0, b"a": 1, b" ab": 2, "é".encode(): 3})
    ends = texts(
        save_tokenizer(tmp_path / "ends", vocabulary(["a", "a</w>"]), model={"end_of_word_suffix": "</w>"})
    )
    assert ends.by_text == {b"a": 0, b"a ": 1}


def test_a_byte_token_is_its_byte_unless_a_piece_is(tmp_path: Path) -> None:
    pieces = ["<0x41>", "<0xC3>", "A", "é"]
    pieced = texts(save_tokenizer(tmp_path / "pieces", vocabulary(pieces), model={"byte_fallback": True}))
    assert pieced.by_text == {b"A": 2, b"\xc3": 1, "é".encode(): 3}
    level = texts(byte_level(tmp_path / "bytes", ["A"]))
    save_tokenizer(tmp_path / "parts", {BYTES[0x41]: 0, BYTES[0xC3]: 1})
    parts = texts(with_document(tmp_path / "parts", pre_tokenizer={"type": "ByteLevel"}))
    assert shared_tokens(pieced, parts).rows == {"<0xC3>": 1, "A": 0}  # not <0x41>, which never stands for A
    assert shared_tokens(level, pieced).rows == {"A": 2}
    assert shared_tokens(pieced, pieced).rows == vocabulary(pieces)  # each byte token by its own name


def test_marks_are_shared_by_name_and_then_by_role(tmp_path: Path) -> None:
    one = save_tokenizer(
        tmp_path / "one",
        {"a": 0},
        [entry("<eos>", 1), entry("<pad>", 2), entry("<s>", 3), entry("[x]", 4), entry("zz", 5, special=False)],
        bos_token="<s>", eos_token="<eos>", pad_token="<pad>",
    )  # fmt: skip
    other = save_tokenizer(
        tmp_path / "other",
        {"[x]": 0, "a": 1, "zz": 2},
        [entry("<|im_end|>", 3), entry("<pad>", 4), entry("<|im_start|>", 5)],
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
    )  # fmt: skip
    found = shared_tokens(texts(one), texts(other))
    assert found.rows == {"a": 1, "<eos>": 3, "<pad>": 4, "<s>": 5, "[x]": 0, "zz": 2}
    assert found.by_role == {"<eos>", "<s>"}
    # A text that reads like a mark is no mark, and rows beyond the table are none.
    assert b"<|im_end|>" not in texts(other).by_text
    assert shared_tokens(texts(one), texts(other, rows=3)).rows == {"a": 1, "[x]": 0, "zz": 2}


SENTENCES = ["the theme", "thesis", "hhh", "é", "日本", "x", "theé!", "", "ttthe", " the"]


def pieces_of(folder: Path) -> TokenPieces:
    return TokenPieces(texts(folder))


def test_pieces_are_those_of_the_tokenizers_library_bpe(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    base = [BYTES[b] for b in range(256)]
    merges = [
        ("t", "h"),
        ("h", "e"),
        ("th", "e"),
        ("Ġ", "the"),
        ("m", "e"),
        ("Ã", "©"),
        ("s", "i"),
        ("si", "s"),
    ]
    words = [*base, *("".join(m) for m in merges)]
    folder = save_tokenizer(tmp_path / "m", vocabulary(words), model={"merges": [list(m) for m in merges]})
    with_document(
        folder,
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    )  # fmt: skip
    referee = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    divider = pieces_of(folder)
    for text in SENTENCES:
        assert divider.divide(text.encode()) == referee.encode(text).ids, text
    assert divider.divide(b" the", without=b" the") == [words.index("Ġ"), words.index("the")]
    assert divider.divide(b"t", without=b"t") == []


def test_pieces_are_those_of_the_tokenizers_library_sentencepiece(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = [*(f"<0x{b:02X}>" for b in range(256)), "▁", *"themsi", "th", "he", "the", "▁the", "é"]
    merges = [["t", "h"], ["h", "e"], ["th", "e"], ["▁", "the"]]
    folder = save_tokenizer(
        tmp_path / "m", vocabulary(words), model={"merges": merges, "byte_fallback": True, "fuse_unk": True}
    )
    with_document(folder, normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    referee = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in SENTENCES:
        assert pieces_of(folder).divide(text.encode()) == referee.encode(text).ids, text


def test_pieces_are_those_of_the_tokenizers_library_unigram(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    scores = [["<unk>", 0.0], ["▁", -2.0], ["t", -3.0], ["h", -3.1], ["e", -2.9], ["th", -4.0], ["the", -5.0], ["▁the", -5.5],
              ["m", -3.3], ["s", -3.0], ["i", -3.0], ["he", -3.5], ["x", -8.0]]  # fmt: skip
    model = {"type": "Unigram", "vocab": scores, "unk_id": 0}
    folder = save_tokenizer(tmp_path / "m", {}, model=model)
    with_document(
        folder,
        model=model,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    )
    referee = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ["the theme", "thesis", "hhh", "ttthe", " the", "xthe"]:
        assert pieces_of(folder).divide(text.encode()) == referee.encode(text).ids, text
    rows = [piece for piece, _ in scores]
    assert pieces_of(folder).divide(b" the", without=b" the") == [rows.index("▁"), rows.index("the")]


def test_words_are_divided_into_the_fewest_pieces(tmp_path: Path) -> None:
    words = ["[UNK]", "un", "##want", "##ed", "##wan", "##t", "##e", "##d", "u", "##n"]
    folder = save_tokenizer(
        tmp_path / "m", vocabulary(words), model={"type": "WordPiece", "unk_token": "[UNK]"}
    )
    assert pieces_of(folder).divide(b" unwanted") == [1, 2, 3]
    assert pieces_of(folder).divide(b" unwanted", without=b" un") == [8, 9, 2, 3]
    assert pieces_of(folder).divide("日".encode()) == []


def test_merges_of_files_without_tokenizer_json_are_read(tmp_path: Path) -> None:
    words = ["t", "h", "e", "Ġ", "th", "the", "Ġthe"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary(words)))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    assert pieces_of(tmp_path).divide(b" thethe") == [6, 5]
