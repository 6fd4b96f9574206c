"""Checkpoints of the hub, scored as their local copies are."""

from __future__ import annotations

import pytest

from alnico.errors import ModelError
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.task_file import read_tasks
from hub.stub import serving


def test_a_model_of_the_hub_is_fetched_and_scored_as_its_copy(made, tmp_path, monkeypatch):
    task = read_tasks(made.valid)[0]
    expected = task.evaluate(open_subject(made.tuned["pets"])).examples
    with serving(tmp_path, monkeypatch) as hub:
        hub.add("org/pets", made.tuned["pets"])
        fetched = open_subject("org/pets")
        assert fetched.label == "org/pets"
        assert (task.evaluate(fetched).examples == expected).all()
    cached = open_subject("org/pets", offline=True)
    assert (task.evaluate(cached).examples == expected).all()


def test_a_single_file_is_no_checkpoint(made):
    path = made.base / "model.safetensors"
    with pytest.raises(ModelError) as caught:
        open_subject(path)
    assert str(caught.value) == (
        f"{path}: is not a directory; tasks score transformers checkpoints. Create one with `alnico merge` first."
    )
