"""``--ray`` takes the next word as its value if that is an address, and stands alone otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from made import family, model_bytes
from made_cluster import ThreadCluster

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("words", "address"),
    [
        (("--ray", "recipe.yml", "out"), ""),
        (("recipe.yml", "out", "--ray"), ""),
        (("recipe.yml", "--ray", "--out", "out"), ""),
        (("--ray", "--", "recipe.yml", "out"), ""),
        (("--ray", "auto", "recipe.yml", "out"), "auto"),
        (("--ray", "10.0.0.1:6379", "recipe.yml", "out"), "10.0.0.1:6379"),
        (("recipe.yml", "out", "--ray", "ray://head:10001"), "ray://head:10001"),
        (("--ray=head:6379", "recipe.yml", "out"), "head:6379"),
        (("--ray=", "recipe.yml", "out"), ""),
    ],
)
def test_an_address_after_the_option_is_its_value(
    words: tuple[str, ...],
    address: str,
    run: Run,
    thread_cluster: ThreadCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=1)
    Path("recipe.yml").write_text("merge_method: linear\nmodels: [tuned-0, tuned-1]\n")
    code, _, messages = run("merge", *words)
    assert (code, thread_cluster.addresses) == (0, [address]), messages
    assert run("merge", "recipe.yml", "alone")[0] == 0
    assert model_bytes(Path("out")) == model_bytes(Path("alone"))


def test_the_help_shows_that_the_address_may_be_left_out(run: Run) -> None:
    for name in ("merge", "search"):
        assert "--ray [ADDRESS]" in run(name, "--help")[1]


def test_a_cluster_that_is_not_there_is_one_message_and_its_code(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=1)
    code, printed, messages = run(
        "merge", "--ray", "127.0.0.1:1", "tuned-0", "tuned-1", "out", "--method", "linear"
    )
    assert (code, printed) == (9, "")
    assert messages.startswith(
        "alnico: the Ray cluster at 127.0.0.1:1 cannot be reached (Connection refused). "
    )
    assert not Path("out").exists()


def test_a_gpu_is_refused_on_a_cluster(
    run: Run, thread_cluster: ThreadCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.devices import Device, made_gpus

    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=1)
    with made_gpus([Device("cuda:0", "Made", 8 << 30)]):
        code, _, messages = run(
            "merge", "--ray", "--device", "cuda", "tuned-0", "tuned-1", "out", "--method", "linear"
        )
    assert code != 0
    assert "nodes of a cluster merge on their processors. Leave out --device, or --ray." in messages
    assert thread_cluster.addresses == [""]
