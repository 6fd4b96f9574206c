"""A merge is resumed, verified and repeated on the kind of device that began it; elsewhere a tolerance or an error says so."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.devices import Device, made_gpus
from alnico.engine.mix import Mixer
from alnico.errors import AlnicoError, OutputError, ResourceError, UncheckedError, VerificationError
from alnico.events import Event, TensorDone
from alnico.plan.job import Plan
from made import family, model_bytes
from verification.test_verify import CHAIN, NAME, TIES

GPU = Device("cuda:0", "Made A", 8 << 30)
OTHER = Device("cuda:1", "Made B", 8 << 30)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("numba_cuda")
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 3, layers=2)
    with made_gpus([GPU, OTHER]):
        yield


def lock() -> dict[str, Any]:
    return json.loads(Path("out/alnico.lock.json").read_text())


def interrupted(device: str) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alnico.merge(TIES, "out", device=device, watch=watch)


def one_step_off(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let merges give the first number of a tensor some units in the last place from what it is."""
    real = Mixer.__call__

    def mix(self: Mixer, start: int, block: Any, out: Any) -> None:
        real(self, start, block, out)
        if self.job.name == NAME and start == 0:
            out[0] ^= steps

    monkeypatch.setattr(Mixer, "__call__", mix)


def test_the_lock_names_the_kind_of_device_and_the_gpus() -> None:
    alnico.merge(TIES, "out")
    assert (lock()["device"], "gpus" in lock()) == ("cpu", False)
    alnico.merge(TIES, "out", device="cuda:all", overwrite=True)
    assert (lock()["device"], lock()["gpus"]) == ("cuda", ["Made A", "Made B"])


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "auto")])
def test_an_interrupted_merge_continues_on_the_same_kind_of_device_only(first: str, second: str) -> None:
    interrupted(first)
    with pytest.raises(OutputError) as caught:
        alnico.merge(TIES, "out", device=second)
    now = "cpu" if second == "auto" else second
    assert str(caught.value) == (
        f".out.alnico-part: holds an unfinished merge that was begun on {first}, and this run is on {now}, whose last bits may "
        f"differ. Continue with --device {first}, or pass --restart to start over."
    )
    assert alnico.merge(TIES, "out", device="cuda:1" if first == "cuda" else "cpu").resumed >= 1


def test_a_merge_starts_over_on_another_device_if_asked() -> None:
    interrupted("cuda")
    assert alnico.merge(TIES, "out", device="cpu", restart=True).resumed == 0


def test_a_journal_without_a_device_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        real = Plan.fingerprint
        before.setattr(
            Plan,
            "fingerprint",
            lambda plan: {key: value for key, value in real(plan).items() if key != "device"},
        )
        interrupted("cpu")
    with pytest.raises(OutputError, match="was begun on cpu, and this run is on cuda"):
        alnico.merge(TIES, "out", device="cuda")
    assert alnico.merge(TIES, "out").resumed >= 1


def test_verify_and_reproduce_use_the_locks_kind_of_device() -> None:
    alnico.merge(TIES, "out", device="cuda")
    verification = alnico.verify("out", against_inputs=True)
    assert verification.recomputed is not None
    assert (verification.recomputed.device, verification.recomputed.tolerance) == ("cuda", 0)
    assert alnico.reproduce("out", "again").devices == ("cuda (Made A)", "cuda (Made A)")
    assert model_bytes(Path("again")) == model_bytes(Path("out"))


def test_an_old_lock_is_the_processors() -> None:
    alnico.merge(TIES, "out")
    text = Path("out/alnico.lock.json").read_text()
    Path("out/alnico.lock.json").write_text(text.replace(' "device": "cpu",\n', ""))
    assert "device" not in lock()
    recomputed = alnico.verify("out", against_inputs=True).recomputed
    assert recomputed is not None
    assert (recomputed.device, recomputed.tolerance) == ("cpu", 0)


@pytest.mark.parametrize("value", ['"tpu"', "3", "null", '["cpu"]'])
def test_a_lock_with_another_device_is_no_lock(value: str) -> None:
    alnico.merge(TIES, "out")
    text = Path("out/alnico.lock.json").read_text()
    Path("out/alnico.lock.json").write_text(text.replace('"device": "cpu"', f'"device": {value}'))
    with pytest.raises(AlnicoError, match="is no lock of alnico"):
        alnico.verify("out")


def test_without_a_gpu_a_merge_is_verified_to_a_unit_in_the_last_place(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    alnico.merge(TIES, "out", device="cuda")
    with made_gpus([]):
        code, printed, _ = run("verify", "out", "--against-inputs")
        assert code == 0
        assert printed.splitlines()[1] == (
            "out: 20 blocks of 20 tensors (100.000% of the bytes) made again from the inputs on cpu, another device than the lock's, "
            "the same bits"
        )
        one_step_off(monkeypatch, 1)
        recomputed = alnico.verify("out", against_inputs=True).recomputed
        assert recomputed is not None
        assert (recomputed.device, recomputed.tolerance, recomputed.elements_differ) == ("cpu", 1, 1)
        code, printed, _ = run("verify", "out", "--against-inputs")
        assert printed.splitlines()[1].endswith(
            "than the lock's, 1 number other by one unit in the last place"
        )
        monkeypatch.undo()


def test_a_larger_difference_is_a_fault_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    alnico.merge(TIES, "out", device="cuda")
    one_step_off(monkeypatch, 4)
    with made_gpus([]), pytest.raises(VerificationError) as caught:
        alnico.verify("out", against_inputs=True)
    assert "from byte 0 of the tensor on; they may differ by one unit in the last place. Merge again" in str(
        caught.value
    )


def test_what_is_reproduced_on_another_device_is_compared_and_a_difference_says_nothing(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    alnico.merge(TIES, "out", device="cuda")
    with made_gpus([]):
        assert alnico.reproduce("out").devices == ("cuda (Made A)", "cpu")
        code, printed, _ = run("reproduce", "out")
        assert (code, printed.rstrip().endswith("on cuda (Made A), and again on cpu")) == (0, True)
        one_step_off(monkeypatch, 1)
        with pytest.raises(UncheckedError) as caught:
            alnico.reproduce("out", "again")
        assert str(caught.value).startswith(
            "out: could not be reproduced: it was merged on cuda (Made A), and again on cpu, whose last bits may differ. out: "
        )
        assert str(caught.value).endswith(
            " Repeat it on a machine with such a device, or run `alnico verify out --against-inputs`, which allows one unit in the last place."
        )
        assert run("reproduce", "out")[0] == 11


def test_a_stage_of_another_device_with_other_bits_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r.yml").write_text(CHAIN)
    alnico.merge_documents("r.yml", "out", device="cuda")
    with made_gpus([]):
        assert alnico.verify("out", against_inputs=True).recomputed is not None
        one_step_off(monkeypatch, 1)
        with pytest.raises(
            UncheckedError, match=r"of the stage first was merged on cuda \(Made A\) and differs"
        ):
            alnico.verify("out", against_inputs=True)


def test_a_device_is_for_checks_against_inputs_only(run: Run) -> None:
    alnico.merge(TIES, "out")
    code, _, printed = run("verify", "out", "--device", "cuda")
    assert (code, "--device is for --against-inputs. Give both." in printed) == (2, True)


def test_the_plan_says_what_runs_where_and_the_peak_of_its_memory(run: Run) -> None:
    Path("r.yml").write_text(json.dumps({**TIES, "missing": "copy"}))
    code, printed, _ = run("plan", "r.yml", "--device", "cuda:all", "--threads", "2")
    assert code == 0
    assert [line for line in printed.splitlines() if line.startswith("device")] == [
        "device    cuda:0 (Made A, 8.6 GB): 13 tensors, at most 572.5 MB of its memory",
        "device    cuda:1 (Made B, 8.6 GB): 7 tensors, at most 572.5 MB of its memory",
    ]
    data = json.loads(run("plan", "r.yml", "--device", "cuda", "--json")[1])
    assert data["devices"] == [
        {
            "device": "cuda:0",
            "model": "Made A",
            "peak_memory_bytes": data["devices"][0]["peak_memory_bytes"],
            "tensors": 20,
        }
    ]
    assert "device" not in run("plan", "r.yml")[1]
    assert "devices" not in json.loads(run("plan", "r.yml", "--json")[1])


def test_mergekits_flags_name_devices(run: Run) -> None:
    Path("r.yml").write_text(json.dumps(TIES))
    for flags, gpus in (
        (["--cuda"], ["Made A"]),
        (["--cuda", "--device", "cuda:1"], ["Made B"]),
        (["--multi-gpu"], ["Made A", "Made B"]),
        (["--gpu-rich", "--cuda", "--read-to-gpu"], ["Made A", "Made B"]),
    ):
        assert run("merge", "r.yml", "out", "--overwrite", *flags)[0] == 0
        assert lock()["gpus"] == gpus
    assert run("merge", "r.yml", "out", "--overwrite", "--no-cuda")[0] == 0
    assert lock()["device"] == "cpu"


def left() -> set[str]:
    return {path.name for path in Path().iterdir()}


def test_a_gpu_that_does_not_exist_is_refused_before_anything_is_made(run: Run) -> None:
    Path("r.yml").write_text(json.dumps(TIES))
    before = left()
    code, _, printed = run("merge", "r.yml", "out", "--device", "cuda:2")
    assert printed == (
        "alnico: device is cuda:2; this machine has cpu, cuda:0 (Made A, 8.6 GB), cuda:1 (Made B, 8.6 GB). Choose one of these.\n"
    )
    assert (code, left()) == (7, before)


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_made() -> None:
    before = left()
    small = Device("cuda:0", "Made", 100 << 20)
    with made_gpus([small]), pytest.raises(ResourceError) as caught:
        alnico.merge(TIES, "out", device="cuda")
    assert str(caught.value) == (
        "plan: the merge needs 538.4 MB of cuda:0 (Made, 104.9 MB); 104.9 MB are free. End other programs that use it, or choose "
        "another device, such as cpu."
    )
    assert left() == before


def test_without_numba_cuda_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = left()
    real = importlib.import_module

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "numba_cuda":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr("alnico.installation.importlib.import_module", refuse)
    with pytest.raises(AlnicoError) as caught:
        alnico.merge(TIES, "out", device="cuda")
    assert str(caught.value).startswith("a merge on cuda:0 needs numba_cuda, which is not installed")
    assert left() == before
