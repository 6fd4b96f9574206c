"""Directories of statistics made for tests, in the documented format, by the safetensors package and json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from made import read_model, save_file
from methods.cases import STATISTICS
from references import made_statistics


def with_statistics(options: Mapping[str, Any], models: Sequence[Path]) -> dict[str, Any]:
    """Write the statistics that options ask for, beside the models, and put their paths into the options."""
    return {
        name: [
            str(made(name, path, i)) if one == STATISTICS else one
            for i, (one, path) in enumerate(zip(value, models, strict=True))
        ]
        if isinstance(value, list)
        else value
        for name, value in options.items()
    }


def made(kind: str, model: Path, place: int) -> Path:
    """Write the statistics of one model, made up for its tensors."""
    held = read_model(model)
    if kind == "fisher":
        tensors = {n: made_statistics.fisher(v.shape, place) for n, v in held.items() if v.dtype.kind == "f"}
        entries = {
            n: {"mean": float(v.astype(np.float64).mean()) if v.size else 0.0} for n, v in tensors.items()
        }
        return write(
            model.parent / f"{model.name}-fisher-{place}", kind, model, tensors, entries, l2_norm=place + 2.0
        )
    tensors = {n: made_statistics.gram(v.shape, place) for n, v in held.items() if v.ndim == 2}
    entries = {
        n: {"rows": made_statistics.ROWS[place], "is_transposed": False, "parts": {"sum": f"{n}.sum"}}
        for n in tensors
    }
    tensors |= {
        f"{n}.sum": gram.diagonal() for n, gram in tensors.items()
    }  # of the right shape; merges do not read it
    vectors = {
        n: made_statistics.squares(v.shape, place)
        for n, v in held.items()
        if v.ndim == 1 and v.dtype.kind == "f"
    }
    entries |= {n: {"rows": made_statistics.ROWS[place], "is_transposed": False} for n in vectors}
    tensors |= vectors
    return write(model.parent / f"{model.name}-gram-{place}", kind, model, tensors, entries)


def write(
    out: Path,
    kind: str,
    model: Path,
    tensors: Mapping[str, np.ndarray],
    entries: Mapping[str, Mapping[str, Any]],
    **numbers: Any,
) -> Path:
    """Write a directory of statistics; ``entries`` are those of the model's tensors."""
    if (out / "statistics.json").exists():
        return out  # as it is: a merge that is taken up must find the same files
    save_file(out / "statistics.safetensors", {n: ("F32", v) for n, v in tensors.items()})
    digests = hashes(model)
    told = {n: {"digest": digests[n], **e} for n, e in entries.items()}
    (out / "statistics.json").write_text(json.dumps({"schema": 1, "kind": kind, **numbers, "tensors": told}))
    return out


def hashes(model: Path) -> dict[str, str]:
    """The hash of every tensor of a model, from the documented recipe: xxh3-128 over dtype, shape and the digests of pieces of 4 MiB."""
    import xxhash

    found = {}
    for path in [model] if model.is_file() else sorted(model.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, told in json.loads(raw[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            begin, end = told["data_offsets"]
            data = raw[8 + length + begin : 8 + length + end]
            state = xxhash.xxh3_128(f"{told['dtype']}|{','.join(map(str, told['shape']))}|".encode())
            for i in range(math.ceil(len(data) / (4 << 20))):
                state.update(xxhash.xxh3_128_digest(data[i * (4 << 20) : (i + 1) * (4 << 20)]))
            found[name] = state.hexdigest()
    return found
