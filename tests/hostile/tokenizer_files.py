"""Malformed tokenizers, each with the check that refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import alnico
from alnico.vocabulary.tokenizer import MAX_ROW, read_tokenizer
from hostile.malformed import Malformed, Read, save, save_json

BPE = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


def files(**held: Any):
    """A tokenizer of files, whose names have ``__`` for a dot: text, bytes or JSON."""

    def make(folder: Path) -> Read:
        for name, value in held.items():
            path = folder / name.replace("__", ".")
            if isinstance(value, bytes):
                path.write_bytes(value)
            else:
                save_json(path, value)
        return lambda: read_tokenizer(folder)

    return make


def document(**keys: Any):
    return files(tokenizer__json={**BPE, **keys})


def merged(changed: Mapping[str, Any]):
    """A model with a tokenizer whose token is added to that of another."""

    def make(folder: Path) -> Read:
        for name, more in (
            ("m", changed),
            ("other", {"model": {"type": "BPE", "vocab": {"c": 0, "d": 1}, "merges": []}}),
        ):
            save(
                folder / name / "model.safetensors",
                {"model.embed_tokens.weight": ("F32", (200_000 if name == "m" else 2, 1))},
            )
            save_json(folder / name / "tokenizer.json", {**BPE, **more})
            save_json(folder / name / "config.json", {"model_type": "llama", "tie_word_embeddings": True})
        recipe = {
            "merge_method": "linear",
            "models": [str(folder / "m"), str(folder / "other")],
            "tokenizer_source": "union",
        }

        def read() -> None:
            for source in alnico.plan(recipe).sources:
                source.close()

        return read

    return make


def pieces(data: bytes):
    return files(tokenizer__model=data)


TOKENIZER_FILES = (
    # tokenizer.py
    Malformed("model.vocab has entries that are not [token, score]", "model.vocab has entries", document(model={"vocab": ["ab"]})),
    Malformed("added_tokens has entries without content or without an id up to", "added_tokens has entries without content", document(added_tokens=[{"id": 1}])),
    Malformed("its vocabulary maps tokens to values that are not row numbers", "values that are not row numbers", document(model={"vocab": {"a": -1}})),
    Malformed("its vocabulary has row {}; expected at most", "its vocabulary has row 4194304", document(model={"vocab": {"a": MAX_ROW + 1}})),
    Malformed("an id outside 0 to {}", "added_tokens has entries without content", document(added_tokens=[{"content": "<s>", "id": -1}])),
    Malformed("is not a sentencepiece model", "is not a sentencepiece model (it has no pieces)", pieces(b"")),
    Malformed("{}: is {}; expected a part of a tokenizer", "is a git-lfs pointer, not the file itself; expected a part of a tokenizer. Run `git lfs", files(vocab__txt=b"version https://git-lfs.github.com/spec/v1")),
    Malformed("the ids of a {} are not the positions of its pieces", "the ids of a XLMRobertaTokenizer are not", files(tokenizer__model=b"\n\x03\n\x01a", tokenizer_config__json={"tokenizer_class": "XLMRobertaTokenizer"})),
    Malformed("{} or {} has added tokens without content or without an id up to", "has added tokens without content", files(vocab__json={"a": 0}, tokenizer_config__json={"added_tokens_decoder": {"1": {}}})),
    # sentencepiece.py
    Malformed("a piece is not a message", "(a piece is not a message)", pieces(b"\x08\x01\n\x03\n\x01a")),
    Malformed("piece {} has no text", "(piece 0 has no text)", pieces(b"\n\x00\n\x03\n\x01a")),
    Malformed("it has no pieces", "(it has no pieces)", pieces(b"\x12\x00")),
    Malformed("no field begins at byte {}", "(no field begins at byte", pieces(b"\n\x03\n\x01a\x0b")),
    Malformed("it ends inside a field", "(it ends inside a field)", pieces(b"\n\x03\n\x01a\n\x09\n\x01b")),
    Malformed("it ends inside a number", "(it ends inside a number)", pieces(b"\n\x03\n\x01a" + b"\x80" * 12)),
    # output.py
    Malformed("more ids without a token than with one", "has 2 tokens and ids up to 199999", merged({"model": {"type": "BPE", "vocab": {"a": 0, "b": 199_999}, "merges": []}})),
    Malformed("its merges, post_processor or padding do not have the format", "do not have the format of the tokenizers library", merged({"padding": {"pad_token": [1], "pad_id": 0}})),
)  # fmt: skip
