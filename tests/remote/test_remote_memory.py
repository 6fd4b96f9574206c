"""A merge of models on a web server stays inside the memory that its plan says, measured in a fresh process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.testing.checks import measure_peak
from limits.made_large import fill, save_sparse
from web_server import Answer, WebServer, serving

SHAPE = (5_300, 5_000)
"""106 MB of F32."""


class LargeFiles(WebServer):
    """Serves parts of files without reading all of them for each."""

    def respond(self, request: Any, path: str) -> Answer:
        file = self.folder / path
        if not file.is_file():
            return Answer(404)
        size = file.stat().st_size
        headers = {"ETag": f'"{path}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if wanted is None:
            return Answer(200, bytes(size) if request.command == "HEAD" else file.read_bytes(), headers)
        first, last = int(wanted[1]), int(wanted[2])
        with open(file, "rb") as source:
            body = os.pread(source.fileno(), last - first + 1, first)
        return Answer(206, body, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("large")
    block = (np.random.default_rng(0).standard_normal(1_000_000) * 0.02).astype(np.float32)
    for i in range(3):
        path = root / f"m{i}.safetensors"
        save_sparse(path, {"n": (1000,), "w": SHAPE}, "F32")
        fill(path, "n", block[:1000])
        fill(path, "w", block + np.float32(0.001 * i))
    with serving(LargeFiles(root)) as server:
        yield server.url


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "budget"), [("linear", 600 << 20), ("ties", 650 << 20), ("ties", 1000 << 20)]
)
def test_models_at_urls_are_merged_inside_the_memory_of_the_plan(
    large: str, tmp_path: Path, method: str, budget: int
) -> None:
    models = [{"model": f"{large}/m{i}.safetensors", "parameters": {"density": 0.5}} for i in (1, 2)]
    recipe = {"merge_method": method, "models": models}
    if method == "ties":
        recipe["base_model"] = f"{large}/m0.safetensors"
    else:
        for model in models:
            model["parameters"] = {"weight": 0.5}
    found = measure_peak(recipe, tmp_path / "out.safetensors", budget)
    print(f"{method}: {found['peak'] / 2**20:.0f} of {found['projected'] / 2**20:.0f} MiB")  # shown with -s
    assert found["peak"] <= found["projected"] <= budget
