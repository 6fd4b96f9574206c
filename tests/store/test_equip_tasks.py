"""`alnico equip --tasks` on real modules: specialists of a tiny BERT, equipped by name from a store and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import alnico
import made as files
import made_vectors
from alnico.devices import Device, made_gpus
from alnico.errors import OutputError
from made_tasks import Made


@pytest.fixture
def store(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with an exact vector of each specialist."""
    folder = tmp_path / "store"
    monkeypatch.setenv("ALNICO_STORE", str(folder))
    base = files.read_file(made.base / "model.safetensors")
    for name, tuned in made.tuned.items():
        after = files.read_file(tuned / "model.safetensors")
        encodings = dict.fromkeys(after, "sparse")
        made_vectors.write_vector(folder / "vectors" / name / "1", base, after, encodings, name=name)
    return folder


@pytest.mark.usefixtures("store")
def test_specialists_equipped_by_name_score_as_the_merge_of_the_fine_tunes(
    made: Made, tmp_path: Path
) -> None:
    weights = dict.fromkeys(made.tuned, 0.5)
    equipped = alnico.equip(made.base, weights, tmp_path / "out", tasks=made.test)
    recipe = alnico.make_recipe(
        [str(path) for path in made.tuned.values()],
        "task_arithmetic",
        base=str(made.base),
        weights=list(weights.values()),
    )
    alnico.merge(recipe, tmp_path / "merged")
    card = alnico.evaluate([made.base, tmp_path / "merged"], made.test)
    assert equipped.controls is not None
    found = {m.reference: {t: s.value for t, s in m.scores.items()} for m in equipped.controls.card.models}
    expected = {m.reference: {t: s.value for t, s in m.scores.items()} for m in card.models}
    assert found["no vector"] == expected[str(made.base)]
    assert found["equipped"] == expected[str(tmp_path / "merged")]
    assert equipped.controls.beats_random is True


@pytest.mark.usefixtures("store")
def test_the_command_shows_the_scores_beside_both_controls(made: Made, tmp_path: Path, run: Any) -> None:
    out = str(tmp_path / "out")
    code, shown, said = run("equip", str(made.base), "pets:1", "-o", out, "--tasks", str(made.test))
    assert code == 0, said
    heads = [line[:30].strip() for line in shown.splitlines()]
    begin = heads.index("no vector")
    assert heads[begin : begin + 3] == ["no vector", "equipped", "random vectors, mean of 3"]
    assert "equipped - no vector" in shown
    assert "equipped - random vectors" in shown
    assert shown.splitlines()[-1].startswith("better than random vectors of the same length")
    code, shown, said = run("unequip", out, "pets", "--json")
    assert (code, json.loads(shown)["vectors"]) == (0, [])
    assert files.read_model(Path(out)).keys() == files.read_model(made.base).keys()


@pytest.mark.usefixtures("store")
def test_nothing_is_left_of_the_controls(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    alnico.equip(made.base, ["sky:1"], tmp_path / "out", tasks=made.test)
    assert list(temporary.iterdir()) == []


def test_a_vector_finds_its_base_inside_a_module_with_a_head(store: Path, made: Made) -> None:
    """The names of the module have a prefix that those of the files lack, and the head is in no file."""
    import torch
    from transformers import BertForSequenceClassification, BertModel

    module = BertForSequenceClassification(BertModel.from_pretrained(made.base).config)
    module.bert.load_state_dict(BertModel.from_pretrained(made.base).state_dict(), strict=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    vector = alnico.Store(store)["pets"]
    vector.equip(module, 1.0)
    tuned = BertModel.from_pretrained(made.tuned["pets"]).state_dict()
    after = module.state_dict()
    shared = [name for name in tuned if f"bert.{name}" in after]
    assert len(shared) >= 35
    assert all(torch.equal(after[f"bert.{name}"], tuned[name]) for name in shared)
    assert torch.equal(after["classifier.weight"], before["classifier.weight"])
    vector.unequip(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.usefixtures("store")
def test_an_output_that_is_there_is_refused_before_anything_is_scored(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    alnico.equip(made.base, ["pets"], out)

    def never(_model: Any) -> float:
        raise AssertionError("was scored")

    with pytest.raises(OutputError, match="exists and is not empty"):
        alnico.equip(made.base, ["sky"], out, tasks=never)


@pytest.mark.usefixtures("store")
def test_the_controls_are_scored_on_the_device(made: Made, tmp_path: Path) -> None:
    gpu = Device("cuda:0", "Made", 8 << 30)
    processor = alnico.equip(made.base, ["pets:1"], tmp_path / "one", tasks=made.test, device="cpu")
    with made_gpus([gpu]):  # auto: merged on the processor
        found = alnico.equip(made.base, ["pets:1"], tmp_path / "other", tasks=made.test)
    assert found.controls is not None
    assert processor.controls is not None
    assert (found.controls.card.device, found.controls.card.dtype) == (str(gpu), "own")
    assert found.controls.card.models == processor.controls.card.models  # the checkpoints are in float32
