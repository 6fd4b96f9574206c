"""For every check of a reader there is a malformed file, made here, that the check refuses and that gets through without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from alnico.errors import AlnicoError
from hostile.adapter_files import ADAPTER_FILES
from hostile.checks import READERS, Check, checks_of, without
from hostile.gguf_files import GGUF_FILES
from hostile.gguf_output_files import GGUF_OUTPUT_FILES
from hostile.lora_files import LORA_FILES
from hostile.malformed import Malformed
from hostile.model_files import MODEL_FILES
from hostile.pickle_files import PICKLE_FILES
from hostile.quantised_files import QUANTISED_FILES
from hostile.tokenizer_files import TOKENIZER_FILES
from hostile.training_files import TRAINING_FILES
from hostile.vector_files import VECTOR_FILES

FILES: tuple[Malformed, ...] = (
    *MODEL_FILES,
    *QUANTISED_FILES,
    *PICKLE_FILES,
    *ADAPTER_FILES,
    *LORA_FILES,
    *TOKENIZER_FILES,
    *TRAINING_FILES,
    *VECTOR_FILES,
    *GGUF_FILES,
    *GGUF_OUTPUT_FILES,
)
CHECKS = [check for reader in READERS for check in checks_of(reader)]


WHOLE = {check.message for check in CHECKS}


def files_of(check: Check) -> list[Malformed]:
    """The files of a check: those that name its whole message, or a part of it that is no other's whole message."""
    return [
        f for f in FILES if f.check == check.message or (f.check in check.message and f.check not in WHOLE)
    ]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_every_check_has_one_file(check: Check) -> None:
    assert len(files_of(check)) == 1, f"give a malformed file to this check in tests/hostile: {check}"


@pytest.mark.parametrize("made", FILES, ids=lambda made: made.check)
def test_every_file_has_one_check(made: Malformed) -> None:
    assert [str(c) for c in CHECKS if made.check in c.message] != [], "no reader has this check any more"


@pytest.mark.parametrize("check", [c for c in CHECKS if len(files_of(c)) == 1], ids=str)
def test_a_file_that_a_check_refuses_gets_through_without_it(check: Check, tmp_path: Path) -> None:
    made = files_of(check)[0]
    read = made.make(tmp_path)
    with pytest.raises(AlnicoError) as caught:
        read()
    assert made.told in str(caught.value)
    with without(check):
        assert made.told not in outcome(read)
    with pytest.raises(AlnicoError):  # the check is back
        read()


def outcome(read) -> str:
    """What a reader that lacks a check makes of a file: it is read, or fails in another way, later and worse."""
    try:
        read()
    except Exception as error:
        return str(error)
    return ""
