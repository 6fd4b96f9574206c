"""What stores elsewhere say: the index of a store, a page of the hub's search, and which files a signature covers."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path

from alnico.checkpoint.hub import _listed_model
from alnico.errors import AlnicoError
from alnico.store.entry import Entry
from alnico.store.remotes.layout import parse_index, read_entry, versions_among
from alnico.store.search_hub import _found
from alnico.store.signed_names import signed_names
from fuzz.harness import Target


def read(data: bytes, folder: Path) -> None:
    with contextlib.suppress(AlnicoError):
        for entry in parse_index(data, "index.jsonl"):
            assert read_entry(entry.line(), "again") == entry
            assert versions_among([f"vectors/{entry.name}/{entry.version}/taskvector.json"])
            entry.line().encode()
    (folder / "model.sig").write_bytes(data)
    assert all(type(name) is str for name in signed_names(folder))
    with contextlib.suppress(ValueError, RecursionError):
        model = _listed_model(json.loads(data))
        if model is not None:
            entry = _found(model, None).entry
            assert read_entry(entry.line(), "hub") == entry


def seeds() -> list[bytes]:
    file = {"taskvector.safetensors": {"size": 10, "sha256": "0" * 64}}
    plain = Entry(
        "sql", 1, "1" * 64, 100, tasks=("sql",), languages=("en",), licence="mit", base="org/base"
    ).data()
    lines = [json.dumps({**plain, "version": i, "files": file, "encodings": {"sparse": 3}}) for i in (1, 2)]
    tags = ["task-vector", "base_model:org/base", "base_model:adapter:org/base"]
    card = {"license": "other", "license_name": "mine", "language": ["en", "ja"], "tags": ["sql", "alnico"]}
    model = {"id": "me/sql", "sha": "a" * 40, "tags": tags, "cardData": card, "downloads": 3, "likes": 1}
    payload = {"predicate": {"resources": [{"name": "README.md"}, {"name": "taskvector.json"}]}}
    signature = {"dsseEnvelope": {"payload": base64.b64encode(json.dumps(payload).encode()).decode()}}
    return [
        lines[0].encode(),
        "\n".join(lines).encode(),
        json.dumps(model).encode(),
        json.dumps(signature).encode(),
    ]


WORDS = (
    "name", "version", "sha256", "manifest_bytes", "kind", "tasks", "languages", "licence", "base", "encodings", "files", "beside", "size", "norm",
    "../x", "taskvector.json", "id", "sha", "tags", "cardData", "downloads", "dsseEnvelope", "payload", "predicate", "resources", "\\ud800", "\n", "1e999",
)  # fmt: skip
TARGET = Target(read, seeds, WORDS)
