"""Tokenizers of strangers with very many merges: work and memory grow as the file does."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CHARACTERS = [chr(0x4E00 + i) for i in range(640)]

MERGE = """
import resource, sys, alnico
a, b, out = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
alnico.merge({"merge_method": "linear", "models": [a, b], "base_model": a, "tokenizer": {"source": "union"}, "parameters": {"weight": 0.5},
              "unrelated": "allow"}, out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def save(folder: Path, merges: int, first: int) -> Path:
    """A model whose tokenizer is of pairs of characters, from the pair ``first`` on."""
    pairs = list(itertools.islice(itertools.product(CHARACTERS, CHARACTERS), first, first + merges))
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, *(a + b for a, b in pairs)])}
    folder.mkdir()
    model = {"type": "BPE", "vocab": vocabulary, "merges": pairs}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model}, ensure_ascii=False)
    )
    config = {
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": 2,
        "num_hidden_layers": 0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = np.full((len(vocabulary), 2), first, np.float32)
    save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("merges", "second"), [(60_000, 60_000), (80_000, 20_000)])
def test_a_union_of_tokenizers_with_very_many_merges_ends_in_bounded_memory(
    tmp_path: Path, merges: int, second: int
) -> None:
    a, b = save(tmp_path / "a", merges, 0), save(tmp_path / "b", merges, second)
    command = [sys.executable, "-c", MERGE, str(a), str(b), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    size = sum((folder / "tokenizer.json").stat().st_size for folder in (a, b))
    assert int(done.stdout) * 1024 < 40 * size + (128 << 20)
    held = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert (
        len(held["model"]["vocab"]) + len(held["added_tokens"])
        == len(CHARACTERS) + min(second, merges) + merges
    )
