"""Searches on devices: made GPUs, which are torch's processor, give its results; each worker has its own device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_modules import Small
from made_search import Maker, settings_of

import alnico
from alnico.devices import CPU, Device, made_gpus
from alnico.errors import OutputError, RecipeError, ResourceError
from alnico.evaluation.placement import ModulePlacement
from alnico.tune.search.workers import WorkerSpec
from made_tasks import Made

GPUS = [Device("cuda:0", "Made", 8 << 30), Device("cuda:1", "Made", 8 << 30)]
Run = Callable[..., tuple[int, str, str]]


def recipe(made: Made, **search: Any) -> dict[str, Any]:
    models = [{"model": m, "parameters": {"weight": {"search": [0.0, 1.2]}}} for m in made.references[:2]]
    settings = {"tasks": str(made.valid), "trials": 4, "sampler": "random", **search}
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(made.base),
        "models": models,
        "search": settings,
    }


def values(result: alnico.SearchResult) -> list[Any]:
    return [(t.point, t.values, t.scores) for t in result.trials]


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_a_gpu_scores_the_trials_of_the_processor(made: Made, device: str) -> None:
    expected = alnico.search(recipe(made), report=made.test, device="cpu")
    with made_gpus(GPUS):
        found = alnico.search(recipe(made), report=made.test, device=device)
    assert values(found) == values(expected)
    assert found.recipe.text == expected.recipe.text
    assert found.report is not None
    assert replace(found.report, device="cpu", dtype="float32") == expected.report
    name = "cuda:1" if device == "cuda:1" else "cuda:0"
    for data in (found.data(), found.report.data()):
        assert (data["device"], data["dtype"]) == (f"{name} (Made, 8.6 GB)", "own")
    assert (expected.data()["device"], expected.data()["dtype"]) == ("cpu", "float32")


def test_the_workers_take_the_devices_in_turn() -> None:
    def places(gpus: int, workers: int) -> list[list[str]]:
        space, _ = settings_of("trials: 1")
        devices = tuple(Device(f"cuda:{i}") for i in range(gpus)) or (CPU,)
        spec = WorkerSpec(space, (), (1.0,), None, lambda _: Maker(), placement=ModulePlacement(devices))
        return [[d.name for d in spec.of_worker(i, workers).placement.devices] for i in range(workers)]

    assert places(2, 2) == [["cuda:0"], ["cuda:1"]]
    assert places(2, 5) == [["cuda:0"], ["cuda:1"], ["cuda:0"], ["cuda:1"], ["cuda:0"]]
    assert places(5, 2) == [["cuda:0", "cuda:2", "cuda:4"], ["cuda:1", "cuda:3"]]
    assert places(3, 1) == [["cuda:0", "cuda:1", "cuda:2"]]
    assert places(0, 2) == [["cpu"], ["cpu"]]


SEEN = """
import os
from pathlib import Path
from alnico.evaluation import candidates

HERE = Path(__file__).parent
begin = candidates.Candidates.__init__


def begun(self, *arguments, placement, **options):
    devices = " ".join(device.name for device in placement.devices)
    (HERE / f"{os.getpid()}.txt").write_text(f"{devices}, {placement.dtype}")
    begin(self, *arguments, placement=placement, **options)


candidates.Candidates.__init__ = begun
"""

SCRIPT = """
import json, sys
import seen
import alnico
from alnico.devices import Device, made_gpus

if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    if options.get("ray"):
        import ray
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with made_gpus([Device("cuda:0", "Made", 8 << 30), Device("cuda:1", "Made", 8 << 30)]):
        found = alnico.search(sys.argv[1], threads=1, **options)
    print("\\n" + json.dumps([t.values for t in found.trials]))
"""


def searched(made: Made, folder: Path, options: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """Search in processes of their own; returns the values of the trials, and what each process used."""
    (folder / "sitecustomize.py").write_text("import seen\n")
    (folder / "seen.py").write_text(SEEN)
    (folder / "script.py").write_text(SCRIPT)
    file = folder / "search.yml"
    file.write_text(yaml.safe_dump(recipe(made)))
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    shown = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(file), json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert shown.returncode == 0, shown.stderr
    used = sorted(p.read_text() for p in folder.glob("*.txt"))
    return [tuple(v) for v in json.loads(shown.stdout.strip().splitlines()[-1])], used


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(options, expected, id=name, marks=mark)
        for name, mark, options, expected in (
            ("all", pytest.mark.slow, {"device": "cuda:all"}, ["cuda:0, auto", "cuda:1, auto"]),
            ("auto", pytest.mark.nightly, {"device": "auto", "workers": 2}, ["cuda:0, auto"] * 2),
            ("one", pytest.mark.nightly, {"device": "cuda:all", "workers": 1, "dtype": "float32"}, ["cuda:0 cuda:1, float32"]),
            ("ray", pytest.mark.slow, {"device": "cuda", "workers": 2, "ray": True}, ["cuda:0, auto"] * 2),
        )
    ],
)  # fmt: skip
def test_each_worker_uses_its_own_device(
    made: Made, tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    if options.get("ray"):
        pytest.importorskip("ray")
    found, used = searched(made, tmp_path, options)
    assert found == [t.values for t in alnico.search(recipe(made), device="cpu").trials]
    assert used == expected


def test_a_study_goes_on_only_on_its_kind_of_device_and_in_its_dtype(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "found"
    with made_gpus(GPUS):
        begun = alnico.search(recipe(made, trials=2), out=out, device="cuda")
        longer = alnico.search(recipe(made, trials=3), out=out, device="cuda:1")
        assert values(longer)[:2] == values(begun)
        with pytest.raises(OutputError) as other:
            alnico.search(recipe(made, trials=3), out=out, device="cuda", dtype="bfloat16")
    assert str(other.value).startswith(
        f"sqlite:///{out / 'study.db'}: the study 'search' was scored on cuda in the checkpoint's dtype, and this search "
        "scores on cuda in bfloat16, so its scores cannot be compared; "
    )
    with pytest.raises(OutputError) as error:
        alnico.search(recipe(made, trials=3), out=out)
    assert str(error.value) == (
        f"sqlite:///{out / 'study.db'}: the study 'search' was scored on cuda in the checkpoint's dtype, and this search "
        "scores on cpu in float32, so its scores cannot be compared; expected one kind of device and one dtype. Give the "
        "device and the dtype of its first run, or give search.study another name."
    )


def test_a_study_without_a_device_was_scored_on_the_processor(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.tune.search.fingerprint import Identity

    data = Identity.data
    with monkeypatch.context() as older:
        older.setattr(Identity, "data", lambda self: {k: v for k, v in data(self).items() if k != "scored"})
        older.setattr("alnico.tune.search.study.Study._check", _stored_by_an_older_version)
        begun = alnico.search(recipe(made, trials=1), out=tmp_path / "found")
    assert values(alnico.search(recipe(made, trials=2), out=tmp_path / "found"))[:1] == values(begun)
    with (
        made_gpus(GPUS),
        pytest.raises(OutputError, match="was scored on cpu in float32, and this search scores on cuda"),
    ):
        alnico.search(recipe(made, trials=3), out=tmp_path / "found", device="cuda")


def _stored_by_an_older_version(self: Any, identity: dict[str, str], _: bool) -> None:
    self._storage.set_study_user_attr(self._id, "alnico", identity)


def test_options_that_no_search_can_follow_are_refused(made: Made) -> None:
    with made_gpus([]), pytest.raises(ResourceError) as none:
        alnico.search(recipe(made), device="cuda")
    assert str(none.value) == (
        "device is cuda; no GPU can be used here (the machine has no GPU). Choose cpu, or fix that."
    )
    for device, message in {
        "cuda:1": "device is cuda:1, and on a Ray cluster (ray) Ray chooses the GPU of each worker; expected auto, cpu, cuda or "
        "cuda:all. Choose cuda.",
        "cuda:all": "device is cuda:all on a Ray cluster (ray), and workers is not given; expected the number of GPUs to use. "
        "Give it as workers.",
    }.items():
        with pytest.raises(RecipeError) as error:
            alnico.search(recipe(made), device=device, ray=True)
        assert str(error.value) == message


def test_a_cluster_with_fewer_gpus_than_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext
    from types import SimpleNamespace

    from alnico.tune.search import workers

    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(workers, "ray_connection", lambda _: nullcontext(ray))
    space, _ = settings_of("trials: 1")
    placement = ModulePlacement((Device("cuda"),))
    spec = WorkerSpec(space, (), (1.0,), None, lambda _: Maker(), placement=placement)
    with pytest.raises(ResourceError) as error, workers.start_workers(spec, 2, "", 1):
        pass
    assert str(error.value) == (
        "the Ray cluster has 1 GPU, and 2 workers need one each; expected a GPU for every worker. Use fewer workers, or the "
        "device cpu."
    )


def test_gpus_without_room_for_their_workers_are_refused_before_anything_is_written(
    made: Made, tmp_path: Path
) -> None:
    gpus = [Device(f"cuda:{i}", "Made", 100_000) for i in range(2)]
    with made_gpus(gpus):
        assert alnico.search(recipe(made, trials=1), device="cuda:1").best
        with pytest.raises(ResourceError) as error:
            alnico.search(recipe(made), out=tmp_path / "out", device="cuda:all", workers=3)
        with pytest.raises(ResourceError) as one:
            alnico.search({**recipe(made), "dtype": "float64"}, out=tmp_path / "out", device="cuda")
    assert str(error.value) == (
        "search: needs 174.3 kB of GPU memory besides its inputs (174.3 kB for the modules of 2 workers, in float32), and "
        "cuda:0 (Made, 100.0 kB) has 100.0 kB free; expected room for all of it. Use fewer workers, or choose device "
        "cpu, or dtype bfloat16."
    )
    assert "174.3 kB for the module of a candidate, in float64" in str(one.value)
    assert str(one.value).endswith(
        "Choose device cuda:all with 1 worker, which spreads the module over all GPUs, or cpu, or dtype bfloat16."
    )
    assert not (tmp_path / "out").exists()


def test_random_weights_and_scales_are_scored_on_a_device() -> None:
    small = Small(2, seed=3)
    options: dict[str, Any] = {"trials": 5, "minimize": True}
    expected = alnico.search_weights(small.models, small.loss, **options)
    scales = alnico.search_scales(small.base, small.models, small.loss, **options)
    with made_gpus(GPUS):
        for device in ("auto", "cuda", "cuda:1"):
            assert alnico.search_weights(small.models, small.loss, device=device, **options) == expected
            assert (
                alnico.search_scales(small.base, small.models, small.loss, device=device, **options) == scales
            )
        with pytest.raises(ResourceError, match="device is cuda:7; this machine has cpu, cuda:0"):
            alnico.search_weights(small.models, small.loss, device="cuda:7", **options)


def test_the_command_takes_a_device_and_names_those_that_exist(made: Made, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "search.yml"
    file.write_text(yaml.safe_dump(recipe(made, trials=2)))
    with made_gpus(GPUS):
        words = ("--out", str(tmp_path / "a"), "--device", "cuda:1", "--dtype", "bfloat16", "--json")
        code, shown, _ = run("search", str(file), *words)
        assert code == 0
        assert (json.loads(shown)["device"], json.loads(shown)["dtype"]) == (
            "cuda:1 (Made, 8.6 GB)",
            "bfloat16",
        )
        code, _, said = run("search", str(file), "--out", str(tmp_path / "b"), "--device", "cuda:9")
    assert code == 7
    assert (
        "device is cuda:9; this machine has cpu, cuda:0 (Made, 8.6 GB), cuda:1 (Made, 8.6 GB). Choose one of these."
        in said
    )
    assert not (tmp_path / "b").exists()
