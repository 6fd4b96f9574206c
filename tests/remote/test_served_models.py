"""Merges of models on an S3-compatible server and on a web server: the local bytes, what is requested, and servers that fail."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.errors import AlnicoError, HubError, ModelError
from made import family, save_file
from s3_server import SECRET, S3Server
from web_server import WebServer

SIDE = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two fine-tunes in two shards each."""
    root = tmp_path_factory.mktemp("here")
    base, _ = family(root, 2, shards=2, layers=1, hidden=32, vocabulary=500)
    (base / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    return root


@pytest.fixture(scope="module")
def local(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge of the models on this machine."""
    out = tmp_path_factory.mktemp("local") / "out"
    merged(str(here), out)
    return out


def merged(place: str, out: Path, method: str = "ties", **options: object) -> alnico.MergeResult:
    recipe = alnico.make_recipe(
        [f"{place}/tuned-0", f"{place}/tuned-1"], method, base=f"{place}/base", density=0.5
    )
    return alnico.merge(recipe, out, max_shard_size="20kB", **options)  # type: ignore[arg-type]


def assert_same(a: Path, b: Path) -> None:
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) > 1
    for name in (*weights, *SIDE):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def requested(server: WebServer, here: Path) -> int:
    """Bytes of weights that a server sent, without headers."""
    total = 0
    for path in here.rglob("*.safetensors"):
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        reads = server.reads_of(path.relative_to(here).as_posix())
        total += sum(count for first, count in reads if first >= begin)
    return total


def serve(s3_server: S3Server, here: Path) -> str:
    for folder in here.iterdir():
        s3_server.put_folder(folder.name, folder)
    return s3_server.url


def test_a_merge_from_s3_has_the_local_bytes_and_requests_what_its_plan_says(
    s3_server: S3Server, here: Path, local: Path, tmp_path: Path
) -> None:
    place = serve(s3_server, here)
    result = merged(place, tmp_path / "there")
    assert_same(tmp_path / "there", local)
    assert requested(s3_server, here) == result.plan.bytes_to_request > 0


def test_a_merge_from_a_web_server_has_the_local_bytes_and_requests_what_its_plan_says(
    web_server: WebServer, here: Path, local: Path, tmp_path: Path
) -> None:
    shutil.copytree(here, web_server.folder, dirs_exist_ok=True)
    result = merged(web_server.url, tmp_path / "there")
    assert_same(tmp_path / "there", local)
    assert requested(web_server, here) == result.plan.bytes_to_request > 0


def test_a_merge_from_s3_to_s3_has_the_local_bytes_and_requests_what_its_plan_says(
    s3_server: S3Server, here: Path, local: Path
) -> None:
    place = serve(s3_server, here)
    result = merged(place, f"{place}/out")  # type: ignore[arg-type]
    for path in local.iterdir():
        if path.name in SIDE or path.suffix == ".safetensors":
            assert s3_server.read(f"out/{path.name}") == path.read_bytes(), path.name
    assert requested(s3_server, here) == result.plan.bytes_to_request > 0


def test_lora_files_without_a_config_are_read_from_a_web_server(
    web_server: WebServer, here: Path, tmp_path: Path
) -> None:
    """It lists no files: a file by its URL, and in a folder the one that diffusers writes."""
    module = "lora_unet_model_layers_0_mlp_up_proj"
    tensors = {
        f"{module}.lora_down.weight": ("F32", np.ones((1, 32))),
        f"{module}.lora_up.weight": ("F32", np.ones((96, 1))),
        f"{module}.alpha": ("F32", np.array(0.5)),
    }
    for name in ("style.safetensors", "named/pytorch_lora_weights.safetensors"):
        save_file(web_server.folder / "lora" / name, tensors)
    alnico.lora.fold(here / "base", web_server.folder / "lora" / "style.safetensors", tmp_path / "local")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "local").glob("*.safetensors")}
    for place in ("lora/style.safetensors", "lora/named"):
        alnico.lora.fold(here / "base", f"{web_server.url}/{place}", tmp_path / "out", overwrite=True)
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors")} == expected
        assert alnico.inspect(f"{web_server.url}/{place}").data()["dialect"] == "kohya"


def test_commands_leave_no_temporary_folders(web_server: WebServer, here: Path, tmp_path: Path) -> None:
    shutil.copytree(here, web_server.folder, dirs_exist_ok=True)
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    for words in (
        ["plan", f"{web_server.url}/tuned-0", f"{web_server.url}/tuned-1"],
        ["inspect", f"{web_server.url}/base"],
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "alnico", *words], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert not list((tmp_path / "temporary").iterdir())


PASSING = {
    "busy": ("status", {"status": 503, "times": 3}),
    "an error of the server": ("status", {"status": 500}),
    "reset": ("reset", {"times": 2}),
    "cut": ("cut", {"times": 2}),
    "the whole file": ("whole", {}),
}


@pytest.mark.parametrize(
    "case", [c if c == "reset" else pytest.param(c, marks=pytest.mark.slow) for c in PASSING]
)
@pytest.mark.usefixtures("impatient")
def test_a_server_that_fails_for_a_while_changes_no_bit(
    s3_server: S3Server, here: Path, local: Path, tmp_path: Path, case: str
) -> None:
    kind, settings = PASSING[case]
    place = serve(s3_server, here)
    s3_server.fail(kind, "tuned-1/*.safetensors", skip=4, **settings)
    merged(place, tmp_path / "there")
    assert s3_server.failures
    assert_same(tmp_path / "there", local)


LASTING = {
    "errors": ("status", {"status": 500}),
    "resets": ("reset", {}),
    "stalls": ("stall", {}),
    "slow": ("slow", {}),
    "wrong ranges": ("wrong range", {}),
    "expired credentials": ("expired", {}),
    "no rights": ("denied", {}),
}


@pytest.mark.parametrize(
    "case", [c if c == "errors" else pytest.param(c, marks=pytest.mark.slow) for c in LASTING]
)
@pytest.mark.usefixtures("impatient")
def test_a_server_that_goes_on_failing_is_one_error_and_the_merge_is_taken_up(
    s3_server: S3Server, here: Path, local: Path, tmp_path: Path, case: str
) -> None:
    kind, settings = LASTING[case]
    place = serve(s3_server, here)
    s3_server.fail(kind, "tuned-1/*.safetensors", skip=8, times=math.inf, **settings)
    with pytest.raises(AlnicoError) as caught:
        merged(place, tmp_path / "there")
    message = str(caught.value)
    assert isinstance(caught.value, HubError), message
    assert "tuned-1/model-0000" in message
    assert SECRET not in message
    assert not (tmp_path / "there").exists()
    s3_server.faults.clear()
    merged(place, tmp_path / "there")
    assert_same(tmp_path / "there", local)


@pytest.mark.usefixtures("impatient")
def test_an_object_that_is_replaced_is_named(s3_server: S3Server, here: Path, tmp_path: Path) -> None:
    place = serve(s3_server, here)
    name = "tuned-1/model-00002-of-00002.safetensors"
    data = bytearray((here / name).read_bytes())
    data[-1] ^= 1
    s3_server.fail("call", name, skip=3, function=lambda: s3_server.put(name, bytes(data)))
    with pytest.raises(ModelError, match=r"tuned-1/model-00002-of-00002\.safetensors"):
        merged(place, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.usefixtures("impatient")
def test_a_bucket_without_rights_and_sizes_that_lie_are_one_message(
    s3_server: S3Server, here: Path, tmp_path: Path
) -> None:
    place = serve(s3_server, here)
    s3_server.fail("denied", methods=("GET", "HEAD"), times=math.inf)
    with pytest.raises(HubError) as caught:
        merged(place, tmp_path / "there")
    assert SECRET not in str(caught.value)
    s3_server.faults.clear()
    s3_server.fail("size", "base/*.safetensors", methods=("GET", "HEAD"), times=math.inf)
    with pytest.raises(AlnicoError, match="base/model-0000"):
        merged(place, tmp_path / "there")
    assert not list(tmp_path.glob("there*"))
