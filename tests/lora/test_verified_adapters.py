"""Adapters that were written are held against their locks, as merges are."""

from __future__ import annotations

from pathlib import Path

import pytest

import alnico
from alnico.errors import UncheckedError, VerificationError
from made import family

FILES = {"extracted": 3, "combined": 2}
"""Files beside the lock and the card: weights, config, and of an extraction its report."""


@pytest.fixture(params=list(FILES))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter that was extracted, or that is two of them combined."""
    base, (one, other) = family(tmp_path, 2, layers=1)
    alnico.lora.extract(one, base, tmp_path / "extracted", rank=2)
    if request.param == "combined":
        alnico.lora.extract(other, base, tmp_path / "b", rank=2)
        alnico.lora.combine(
            [tmp_path / "extracted", tmp_path / "b"], tmp_path / "combined", method="cat", weights=0.5
        )
    return tmp_path / request.param


def test_an_adapter_is_as_its_lock_says(written: Path) -> None:
    found = alnico.verify(written)
    assert found.unchecked == ()
    assert found.files == FILES[written.name]
    assert found.tensors == _tensors(written)


def _tensors(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return len(file.keys())


def test_a_flipped_bit_of_an_adapter_is_named(written: Path) -> None:
    path = written / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"base_model\.model\..* has the hash"):
        alnico.verify(written)


def test_a_changed_config_of_an_adapter_is_named(written: Path) -> None:
    path = written / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_dropout": 0.0', '"lora_dropout": 0.1'))
    with pytest.raises(VerificationError, match=r"adapter_config\.json: has the hash"):
        alnico.verify(written)


def test_an_adapter_is_not_made_again_and_that_is_no_pass(written: Path) -> None:
    with pytest.raises(UncheckedError, match="it is an adapter, which no recipe makes"):
        alnico.verify(written, against_inputs=True)
    with pytest.raises(UncheckedError, match="it is an adapter"):
        alnico.reproduce(written)
