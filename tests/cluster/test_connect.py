"""Addresses that are no Ray cluster are refused at once; a real cluster of three nodes works and loses nodes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alnico.cluster.connect import _ask_for_token, connect
from alnico.errors import AlnicoError, RunError
from made_cluster import RayNodes, StartWhere


def test_a_text_that_is_no_address_is_refused() -> None:
    with pytest.raises(RunError) as caught, connect("tomorrow"):
        pass
    assert str(caught.value) == (
        "tomorrow is not the address of a Ray cluster; expected HOST:PORT, such as 10.0.0.1:6379, ray://HOST:PORT or auto. Correct "
        "--ray, or RAY_ADDRESS."
    )


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nothing_answers_one_error_says_so(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"{scheme}127.0.0.1:{port}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError) as caught, connect(""):
        pass
    assert str(caught.value) == (
        f"the Ray cluster at {address} cannot be reached (Connection refused). Check the address (--ray, or RAY_ADDRESS) and that "
        "`ray status` answers there; run this on a node of the cluster, or leave out --ray to compute on this machine."
    )


def test_a_server_that_is_not_ray_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with (
            pytest.raises(RunError, match="cannot be reached \\(something else than Ray answers there\\)"),
            connect(f"127.0.0.1:{server.getsockname()[1]}"),
        ):
            pass
        thread.join()


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with (
        pytest.raises(AlnicoError, match=r"--ray needs ray, which is not installed\. Run: pip install"),
        connect(""),
    ):
        pass


def test_a_cluster_that_asks_for_a_token_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: object) -> None:
        try:
            raise RuntimeError(
                "Failed to connect to GCS. Last connection error: ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken"
            )
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr("alnico.cluster.connect._check_reachable", lambda _: None)
    with pytest.raises(RunError) as caught, connect("10.0.0.1:6379"):
        pass
    assert str(caught.value) == (
        "the Ray cluster at 10.0.0.1:6379 asks for a token, which this process does not have. Set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that the cluster was started with."
    )


@pytest.mark.nightly
def test_nodes_do_units_without_the_folder_of_the_driver(
    ray_nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "xxhash.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    answers = {}
    with connect(ray_nodes.address) as cluster:
        assert len(cluster.nodes) == 3
        victim = ray_nodes.nodes[0]

        def done(number: int, value: tuple[int, list[str]]) -> None:
            if not answers:
                ray_nodes.kill(victim)
            answers[number] = value

        cluster.run(StartWhere(), list(range(30)), done)
    assert {number: unit for number, (unit, _) in answers.items()} == {n: n for n in range(30)}
    assert all(str(tmp_path) not in path and "" not in path for _, path in answers.values())
    assert capfd.readouterr() == ("", "")


@pytest.mark.nightly
def test_a_node_without_alnico_is_named(ray_nodes: RayNodes, tmp_path: Path) -> None:
    (tmp_path / "alnico").mkdir()
    (tmp_path / "alnico" / "__init__.py").write_text("")
    bad = ray_nodes.add(PYTHONPATH=str(tmp_path))
    try:
        with pytest.raises(RunError) as caught, connect(ray_nodes.address):
            pass
    finally:
        ray_nodes.kill(bad)
    assert "alnico cannot run there (ModuleNotFoundError: No module named 'alnico." in str(caught.value)


STARTED_HERE = """
import os, subprocess, sys
from alnico.cluster.connect import connect
with connect("") as cluster:
    import ray
    address = ray.get_runtime_context().gcs_address
    code = f"import ray; ray.init(address={address!r}); print('came in')"
    stranger = {name: text for name, text in os.environ.items() if not name.startswith("RAY_AUTH")}
    ended = subprocess.run([sys.executable, "-c", code], env=stranger | {"HOME": sys.argv[1]}, capture_output=True, text=True)
    print(len(cluster.nodes), ended.returncode != 0 and "came in" not in ended.stdout)
with connect("") as cluster:
    print(len(cluster.nodes))
"""


@pytest.mark.nightly
def test_a_cluster_that_is_started_here_lets_no_stranger_in(tmp_path: Path) -> None:
    own = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    home, stranger = tmp_path / "home", tmp_path / "stranger"
    home.mkdir()
    stranger.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", STARTED_HERE, str(stranger)],
        env=own | {"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.split() == ["1", "True", "1"], ended.stderr[-2000:]
    # Ray would leave a token there, and `ray start` would ask for it from then on.
    assert not (home / ".ray").exists()


@pytest.mark.parametrize(
    ("imported", "mode", "asks"), [(False, None, True), (True, None, False), (False, "disabled", False)]
)
def test_a_token_is_asked_for_unless_the_user_decides(
    imported: bool, mode: str | None, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that both are put back
        monkeypatch.delenv(name)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setitem(sys.modules, "ray", sys)
    if not imported:
        monkeypatch.delitem(sys.modules, "ray")
    _ask_for_token()
    assert os.environ.get("RAY_AUTH_MODE") == ("token" if asks else mode)
    assert (len(os.environ.get("RAY_AUTH_TOKEN", "")) == 64) is asks
