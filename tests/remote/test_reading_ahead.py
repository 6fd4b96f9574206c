"""What a merge requests of models at URLs: as many bytes as its plan says, in the memory that it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.checkpoint.remote import remote_weights
from alnico.engine import reading_ahead
from counting_folder import ADDRESS, Elsewhere
from made import family

PIECE = 16 << 10


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 KiB, so that small tensors have several."""
    for module in (remote_weights, reading_ahead):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)


@pytest.fixture
def models(elsewhere: Elsewhere) -> tuple[str, list[str]]:
    base, tuned = family(elsewhere.root, 3, shards=2, layers=2, hidden=128, vocabulary=1000)
    return f"{ADDRESS}/{base.name}", [f"{ADDRESS}/{path.name}" for path in tuned]


def requested(elsewhere: Elsewhere) -> int:
    return sum(elsewhere.weight_bytes().values())


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "model_stock": {},
    "tsv": {},
    "breadcrumbs": {"density": 0.8},
    "sce": {},
}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("method", RECIPES)
def test_a_merge_requests_the_bytes_that_its_plan_says(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path, method: str, threads: int
) -> None:
    base, tuned = models
    recipe = alnico.make_recipe(tuned, method, base=None if method == "linear" else base, **RECIPES[method])
    plan = alnico.plan(recipe, threads=threads)
    alnico.merge(recipe, tmp_path / "out", threads=threads)
    assert requested(elsewhere) == plan.bytes_to_request
    assert plan.summary()["bytes_to_request"] == plan.bytes_to_request
    sample = plan.bytes_to_request - plan.bytes_to_read
    assert 0 < sample < plan.bytes_to_read  # each byte once, and the sample
    for name, reads in elsewhere.reads.items():
        if name.endswith(".safetensors"):
            assert max(size for _, size in reads) <= 2 * PIECE  # a sample has 32 KiB


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 64 KiB for what is read ahead, in place of 32 MiB."""
    from alnico.plan import memory

    monkeypatch.setattr(memory, "LEAST_AHEAD_BYTES", 64 << 10)


@pytest.mark.usefixtures("small_pieces", "little_room")
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear", "breadcrumbs"])
def test_what_does_not_fit_is_requested_as_often_as_the_plan_says(
    elsewhere: Elsewhere, tmp_path: Path, method: str, threads: int
) -> None:
    folder, folders = family(elsewhere.root, 2, shards=2, layers=1, hidden=128, vocabulary=5000)
    base, tuned = f"{ADDRESS}/{folder.name}", [f"{ADDRESS}/{path.name}" for path in folders]
    recipe = alnico.make_recipe(tuned, method, base=None if method == "linear" else base, **RECIPES[method])
    roomy = alnico.plan(recipe, threads=threads)
    memory = roomy.memory.peak_bytes - roomy.memory.ahead_bytes + (64 << 10)
    plan = alnico.plan(recipe, threads=threads, memory=memory)
    assert plan.memory.ahead_bytes < roomy.memory.ahead_bytes
    alnico.merge(recipe, tmp_path / "out", threads=threads, memory=memory)
    assert requested(elsewhere) == plan.bytes_to_request
    if method == "linear":
        assert plan.bytes_to_request == roomy.bytes_to_request
    else:  # they measure first
        assert plan.bytes_to_request > roomy.bytes_to_request
    alnico.merge(recipe, tmp_path / "roomy", threads=threads)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "roomy" / name).read_bytes()


OTHERS: dict[str, str] = {
    "ties over the whole model": """
merge_method: ties
base_model: BASE
parameters: {density: 0.5, scope: model}
models: [ONE, TWO]
""",
    "weights from norms": """
merge_method: task_arithmetic
base_model: BASE
parameters: {weight: {from: l2_norm, mode: exp}}
models: [ONE, TWO]
""",
    "slerp": """
merge_method: slerp
base_model: ONE
models: [ONE, TWO]
parameters: {t: 0.3}
""",
    "layers twice": """
merge_method: passthrough
slices:
  - sources: [{model: ONE, layer_range: [0, 2]}]
  - sources: [{model: ONE, layer_range: [1, 2]}]
  - sources: [{model: TWO, layer_range: [0, 1]}]
""",
    "an adapter": """
merge_method: linear
models: [BASE+0.5*ADAPTER, ONE]
""",
    "an adapter, measured": """
merge_method: ties
base_model: BASE
parameters: {density: 0.5}
models: [BASE+ADAPTER, ONE, ../bucket/tuned-2]
""",
}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("case", OTHERS)
def test_recipes_of_many_kinds_request_what_their_plans_say_and_give_the_local_bytes(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path, case: str
) -> None:
    base, tuned = models
    alnico.lora.extract(base, tuned[0], elsewhere.root / "adapter", rank=4)
    elsewhere.reads.clear()
    (tmp_path / "recipes").mkdir()
    text = OTHERS[case]
    places = {"BASE": "base", "ONE": "tuned-0", "TWO": "tuned-1", "ADAPTER": "adapter"}
    for place in (ADDRESS, str(elsewhere.root)):
        made = text
        for word, name in places.items():
            made = made.replace(word, f"{place}/{name}")
        (tmp_path / "recipes" / f"{place == ADDRESS}.yml").write_text(made)
    plan = alnico.plan(tmp_path / "recipes" / "True.yml")
    elsewhere.reads.clear()
    alnico.merge(tmp_path / "recipes" / "True.yml", tmp_path / "there")
    found = {name: count for name, count in elsewhere.weight_bytes().items() if "adapter" not in name}
    assert sum(found.values()) == plan.bytes_to_request
    alnico.merge(tmp_path / "recipes" / "False.yml", tmp_path / "here")
    weights = [p.name for p in (tmp_path / "here").glob("*.safetensors")]
    assert weights
    for name in (*weights, "config.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
