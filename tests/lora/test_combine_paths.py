"""Adapters whose paths are no UTF-8."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from alnico.lora.combine import combine
from lora import made_adapters


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_adapters_are_combined_whatever_their_folder_is_called(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xffme"))
    folder.mkdir()
    for i in range(2):
        tensors = made_adapters.factors("model.layers.0.self_attn.q_proj", 16, 16, 2, i)
        made_adapters.save(folder / f"adapter-{i}", tensors, r=2, lora_alpha=2, target_modules=["q_proj"])
    combine([folder / "adapter-0", folder / "adapter-1"], folder / "out")
    assert "na\udcffme" in json.dumps(
        json.loads((folder / "out" / "alnico.lock.json").read_text()), ensure_ascii=False
    )
