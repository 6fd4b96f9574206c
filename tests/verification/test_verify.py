"""A finished merge is held against its lock and against its inputs; what could not be checked is never a pass."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.errors import AlnicoError, ModelError, OutputError, UncheckedError, VerificationError
from alnico.kernels.constants import ARITHMETIC
from made import encoded, family, read_file, save_file, save_model
from made_tokenizers import save_family
from methods.sides import hashes, made

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": ["tuned-0", "tuned-1"],
    "parameters": {"density": 0.5},
    "seed": 3,
}
CHAIN = """\
name: first
merge_method: ties
base_model: base
models: [tuned-0, tuned-1]
parameters: {density: 0.5, scope: model}
---
name: second
merge_method: dare_linear
base_model: first
models: [tuned-2]
parameters: {weight: 0.3, density: 0.5}
---
merge_method: slerp
base_model: first
models: [first, second]
parameters: {t: 0.4}
"""
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, _ = family(tmp_path, 3, layers=2)
    (base / "tokenizer_config.json").write_text("{}")


def told(call: Callable[[], object], kind: type[AlnicoError] = VerificationError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def names() -> set[str]:
    return {p.name for p in Path().iterdir()}


def place_of(file: Path, tensor: str) -> int:
    """The byte of a file where a tensor begins, by its header."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length + int(json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0])


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


def edit_lock(change: Callable[[dict[str, Any]], object], out: str = "out") -> None:
    path = Path(out) / "alnico.lock.json"
    lock = json.loads(path.read_text())
    change(lock)
    path.write_text(json.dumps(lock))


def recipes() -> dict[str, Any]:
    """A merge of each kind: what is measured and what is not, random ones, statistics, layers, weights from norms, an adapter."""
    factors = {
        "q.lora_A.weight": np.ones((1, 16), np.float32),
        "q.lora_B.weight": np.full((16, 1), 0.01, np.float32),
    }
    key = "base_model.model.model.layers.0.self_attn."
    save_file(
        Path("adapter/adapter_model.safetensors"),
        {f"{key}q_proj.{n[2:]}": ("F32", v) for n, v in factors.items()},
    )
    Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    pair = ["tuned-0", "tuned-1"]
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in pair]
    fisher, gram = (
        [{"model": m, "parameters": {kind: str(made(kind, Path(m), i))}} for i, m in enumerate(pair)]
        for kind in ("fisher", "gram")
    )
    return {
        "ties": TIES,
        "over the model": {**TIES, "parameters": {"density": 0.5, "scope": "model"}},
        "random": {**TIES, "merge_method": "dare_ties"},
        "by rank": {**TIES, "merge_method": "della"},
        "linear": {"merge_method": "linear", "models": pair, "dtype": "float16"},
        "slerp": {
            "merge_method": "slerp",
            "base_model": "tuned-0",
            "models": pair,
            "parameters": {"t": [0, 0.5, 1]},
        },
        "layers": {"merge_method": "passthrough", "slices": slices},
        "norms": {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": pair,
            "parameters": {"weight": {"from": "l2_norm"}},
        },
        "an adapter": {"merge_method": "linear", "models": ["base+adapter", "tuned-1"]},
        "fisher": {"merge_method": "fisher", "models": fisher},
        "regmean": {"merge_method": "regmean", "models": gram},
    }


KINDS = [
    "ties",
    "over the model",
    "random",
    "by rank",
    "linear",
    "slerp",
    "layers",
    "norms",
    "an adapter",
    "fisher",
    "regmean",
]


# ---- what passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_any_kind_is_made_again_from_its_inputs_bit_for_bit(kind: str) -> None:
    recipe = recipes()[kind]
    before = alnico.merge(recipe, "out", max_shard_size=20_000)
    found = alnico.verify("out", against_inputs=True, threads=2)
    size = sum(p.stat().st_size for p in Path("out").glob("*.safetensors"))
    assert found.tensors == len(before.digests) == found.recomputed.tensors
    assert found.recomputed.byte_size == found.recomputed.total_bytes == found.byte_size < size
    assert found.unchecked == ()
    assert alnico.verify("out", against_inputs=True, sample=0.2, threads=1).recomputed.tensors < found.tensors


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_in_tensor_and_lock_is_found_from_the_inputs_alone(kind: str) -> None:
    alnico.merge(recipes()[kind], "out")
    file = Path("out/model.safetensors")
    byte = place_of(file, NAME) + 2 * (5 * 16 + 7)  # 16-bit elements of a matrix of 16 columns
    flip(file, byte)
    edit_lock(lambda lock: lock["output"][NAME].update(digest=hashes(Path("out"))[NAME]))
    assert alnico.verify("out").unchecked == ()
    message = told(lambda: alnico.verify("out", against_inputs=True))
    assert message.startswith(f"out: {NAME}[5, 7] is ")
    assert (
        "when it is made again from the inputs, from byte 174 of the tensor on; they must be the same. Merge again"
        in message
    )
    assert message.endswith("on one type of machine only.)") == (kind == "regmean")


def test_stages_are_made_again_as_far_as_they_are_needed_and_nothing_is_left() -> None:
    Path("r.yml").write_text(CHAIN)
    alnico.merge_documents("r.yml", "out", seed=9)
    before = names()
    found = alnico.verify("out", against_inputs=True)
    assert found.recomputed.tensors == found.tensors
    assert alnico.verify("out", against_inputs=True, sample=0.1).recomputed.tensors < found.tensors
    assert names() == before


def test_a_stage_that_is_not_what_its_lock_says_is_named() -> None:
    Path("r.yml").write_text(CHAIN)
    alnico.merge_documents("r.yml", "out")
    edit_lock(lambda lock: lock["inputs"][0]["lock"]["output"][NAME].update(digest="0" * 32))
    message = told(lambda: alnico.verify("out", against_inputs=True))
    assert message.startswith(
        f"out/alnico.lock.json: {NAME} of the stage first has the hash {'0' * 32} in the lock and "
    )


def test_models_with_other_tokens_are_made_again_also_from_stages() -> None:
    save_family(Path("words"))
    parts = "tokenizer: {source: union}\ndtype: float32\n"
    models = sorted(p.name for p in Path("words").iterdir())[:3]
    one, two, three = (f"words/{m}" for m in models)
    text = f"name: first\nmerge_method: linear\nmodels: [{one}, {two}]\n{parts}---\nmerge_method: linear\nmodels: [first, {three}]\n{parts}"
    Path("r.yml").write_text(text)
    alnico.merge_documents("r.yml", "out")
    assert alnico.verify("out", against_inputs=True).unchecked == ()


def test_rows_that_a_model_lacks_come_from_a_stage_also_where_no_tensor_of_it_is_merged() -> None:
    save_family(Path("words"))
    parts = "tokenizer: {source: union}\nunrelated: allow\n"
    text = f"name: first\nmerge_method: linear\nmodels: [words/base, words/chat]\n{parts}---\n"
    Path("r.yml").write_text(
        f"{text}merge_method: passthrough\nbase_model: first\nmodels: [words/other]\n{parts}"
    )
    alnico.merge_documents("r.yml", "out")
    assert alnico.verify("out", against_inputs=True).unchecked == ()


def test_what_is_measured_over_the_model_is_read_whole_also_from_a_stage() -> None:
    text = "name: first\nmerge_method: linear\nmodels: [tuned-0, tuned-1]\n---\nmerge_method: ties\nbase_model: base\n"
    Path("r.yml").write_text(f"{text}models: [first, tuned-2]\nparameters: {{density: 0.3, scope: model}}\n")
    alnico.merge_documents("r.yml", "out")
    assert alnico.verify("out", against_inputs=True, sample=0.001).recomputed.tensors == 1


def test_the_sample_is_of_blocks_the_same_for_a_seed_and_no_more_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        save_model(Path(name), {"w": ("F32", random.standard_normal((2200, 2500)).astype(np.float32))})
    alnico.merge({"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow"}, "out")
    read: list[tuple[str, int, int]] = []
    real = FileModel.read_into

    def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        if model.label in ("a", "b"):
            read.append((model.label, offset, len(buffer)))
        real(model, name, offset, buffer)

    monkeypatch.setattr(FileModel, "read_into", read_into)
    found = alnico.verify("out", against_inputs=True, sample=0.01, seed=1, threads=1).recomputed
    assert (found.blocks, found.tensors, found.byte_size, found.total_bytes) == (1, 1, 4 << 20, 22_000_000)
    assert sum(size for _, _, size in read) == 2 * found.byte_size
    first, read[:] = sorted(read), []
    alnico.verify("out", against_inputs=True, sample=0.01, seed=1, threads=2)
    assert sorted(read) == first
    others = []
    for seed in range(2, 8):
        read.clear()
        alnico.verify("out", against_inputs=True, sample=0.01, seed=seed)
        others.append(sorted(read))
    assert any(other != first for other in others)
    assert alnico.verify("out", against_inputs=True, sample=0.6).recomputed.blocks == 4


# ---- what is damaged ------------------------------------------------------------------------------------------------


def test_a_bit_of_any_tensor_is_found_by_its_hash() -> None:
    alnico.merge(TIES, "whole", max_shard_size=10_000)
    for file in sorted(Path("whole").glob("*.safetensors")):
        for name in read_file(file):
            shutil.copytree("whole", "out")
            flip(Path("out") / file.name, place_of(file, name) + 1)
            said = json.loads(Path("whole/alnico.lock.json").read_text())["output"][name]["digest"]
            assert told(lambda: alnico.verify("out")) == (
                f"out: {name} has the hash {hashes(Path('out'))[name]}, alnico.lock.json says {said}; expected the bytes that the merge wrote. "
                "Merge again, or get a new copy of the output; --against-inputs names the first element that differs."
            )
            shutil.rmtree("out")


def test_the_first_element_of_a_damaged_tensor_is_named_also_outside_the_sample() -> None:
    alnico.merge({**TIES, "dtype": "float32"}, "out")
    file = Path("out/model.safetensors")
    place = place_of(file, NAME)
    before = np.frombuffer(file.read_bytes()[place + 4 * 19 :][:4], np.float32)[0]
    data = bytearray(file.read_bytes())
    data[place + 4 * 19 : place + 4 * 20] = encoded("F32", np.float32([1.5]))
    file.write_bytes(data)
    shown = f"{float(before):.9g}, 0x{before.view(np.uint32):08x}"
    assert told(lambda: alnico.verify("out", against_inputs=True, sample=0.001)) == (
        f"out: {NAME}[1, 3] is 1.5, 0x3fc00000 in the output and {shown} when it is made again from the inputs, from byte "
        f"{4 * 19 + _first_byte(before)} of the tensor on; they must be the same. Merge again, or get a new copy of the output."
    )


def _first_byte(before: np.float32) -> int:
    """The first of four bytes in which a number differs from 1.5."""
    return next(
        i for i, (a, b) in enumerate(zip(before.tobytes(), np.float32(1.5).tobytes(), strict=True)) if a != b
    )


def test_a_lock_that_lies_about_a_sound_tensor_is_named() -> None:
    alnico.merge(TIES, "out")
    edit_lock(lambda lock: lock["output"][NAME].update(digest="0" * 32))
    for options in ({}, {"against_inputs": True}):
        assert told(lambda options=options: alnico.verify("out", **options)).startswith(
            f"out: {NAME} has the hash {hashes(Path('out'))[NAME]}, alnico.lock.json says {'0' * 32};"
        )


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda: flip(Path("out/config.json"), 3), "out/config.json: has the hash "),
        (lambda: flip(Path("out/mergekit_config.yml"), 3), "out/mergekit_config.yml: has the hash "),
        (lambda: Path("out/tokenizer_config.json").unlink(), "out/tokenizer_config.json: is missing; expected the file that the merge wrote. "),
        (lambda: os.truncate("out/model.safetensors", 9_000), "out: is damaged: out/model.safetensors: "),
        (lambda: Path("out/model.safetensors").unlink(), "out: is damaged: out: has no .safetensors or .bin file"),
        (lambda: _with_metadata(), "out/model.safetensors: has another header or size than the lock says; expected the file "),
        (lambda: _without(NAME), f"out: {NAME} is missing in the weights and BF16 [48, 16] in alnico.lock.json; they must be of one merge."),
        (lambda: edit_lock(lambda lock: lock["output"].pop(NAME)), f"out: {NAME} is BF16 [48, 16] in the weights and missing in alnico.lock.json"),
    ],
)  # fmt: skip
def test_damaged_and_missing_files_are_named(damage: Callable[[], object], expected: str) -> None:
    alnico.merge(TIES, "out")
    damage()
    assert told(lambda: alnico.verify("out")).startswith(expected)


def _with_metadata() -> None:
    file = Path("out/model.safetensors")
    save_file(file, {n: (d, v) for n, (d, v) in read_file(file).items()}, {"format": "pt", "note": "other"})


def _without(name: str) -> None:
    file = Path("out/model.safetensors")
    save_file(file, {n: (d, v) for n, (d, v) in read_file(file).items() if n != name})


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"output": 3}', '{"hash": "xxh3-128", "output": {"w": {}}}']
)
def test_a_lock_that_is_none_is_no_pass(text: str) -> None:
    alnico.merge(TIES, "out")
    Path("out/alnico.lock.json").write_text(text)
    with pytest.raises(AlnicoError, match=r"^out/alnico\.lock\.json: "):
        alnico.verify("out")


def test_a_lock_names_no_file_outside() -> None:
    alnico.merge(TIES, "out")
    edit_lock(lambda lock: lock["files"].update({"../base/config.json": {}}))
    with pytest.raises(AlnicoError, match=r"is no lock of alnico \(a file outside the model's directory\)"):
        alnico.verify("out")


# ---- what could not be checked --------------------------------------------------------------------------------------


def test_one_file_has_no_lock() -> None:
    alnico.merge(TIES, "out.safetensors")
    assert told(lambda: alnico.verify("out.safetensors"), UncheckedError) == (
        "out.safetensors: could not check: it is one file, and a lock goes with a directory only. Merge into a directory to have it checked."
    )


def test_a_file_of_a_finished_merge_leads_to_its_directory() -> None:
    alnico.merge(TIES, "out")
    assert told(lambda: alnico.verify("out/model.safetensors"), UncheckedError) == (
        "out/model.safetensors: could not check: it is one file of a finished merge; expected its directory. Give out."
    )


def test_a_model_of_others_has_no_lock() -> None:
    assert told(lambda: alnico.verify("base"), UncheckedError) == (
        "base: could not check: it has no alnico.lock.json, which lists what must be there; expected the output of `alnico merge`. Check the path."
    )
    assert told(lambda: alnico.verify("nowhere"), OutputError).startswith("nowhere: no such directory; ")


def test_an_older_lock_without_hashes_of_side_files_is_checked_as_far_as_it_goes() -> None:
    alnico.merge(TIES, "out")
    edit_lock(lambda lock: lock.pop("files"))
    with pytest.raises(UncheckedError) as caught:
        alnico.verify("out", against_inputs=True)
    assert str(caught.value) == (
        "out: could not check config.json, mergekit_config.yml, tokenizer_config.json: alnico.lock.json is of an older alnico, which did not "
        "write hashes of files beside the weights. `alnico reproduce` makes them again."
    )
    assert (
        caught.value.result.tensors,
        caught.value.result.files,
        caught.value.result.recomputed.tensors,
    ) == (
        20,
        0,
        20,
    )
    flip(Path("out/model.safetensors"), 9_000)
    assert "has the hash" in told(lambda: alnico.verify("out"))


def test_a_file_that_the_lock_does_not_list_is_no_pass_but_card_signature_and_hidden_files_are_none_of_it() -> (
    None
):
    alnico.merge(TIES, "out")
    (Path("out") / "README.md").write_text("# My merge")
    (Path("out") / ".gitattributes").write_text("")
    assert alnico.verify("out").files == 4
    Path("out/modeling_own.py").write_text("import os")
    assert told(lambda: alnico.verify("out"), UncheckedError) == (
        "out: could not check modeling_own.py: alnico.lock.json does not list it. Move what is no part of the merge."
    )


def test_links_to_files_are_followed_and_those_to_folders_are_no_part_of_a_merge(tmp_path: Path) -> None:
    out, blobs = Path("hub/snapshots/c0ffee"), tmp_path / "hub/blobs"  # as the hub's cache lays a model out
    alnico.merge(TIES, out)
    blobs.mkdir()
    for path in [*out.iterdir()]:
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert alnico.verify(out).files == 4
    (out / "code").symlink_to(tmp_path / "base")
    assert told(lambda: alnico.verify(out), UncheckedError).startswith(f"{out}: could not check code: ")


def test_an_input_that_is_gone_or_another_is_named_and_where_it_lies_now_is_taken() -> None:
    alnico.merge(TIES, "out")
    Path("tuned-1").rename("moved")
    assert told(lambda: alnico.verify("out", against_inputs=True), UncheckedError) == (
        "out: could not check against its inputs: tuned-1 is neither here nor next to it; expected the inputs of the merge. Say where with "
        "--input tuned-1=PATH."
    )
    assert alnico.verify("out", against_inputs=True, inputs={"tuned-1": "moved"}).recomputed.tensors == 20
    for sample in (1.0, 0.3):
        assert told(
            lambda s=sample: alnico.verify(
                "out", against_inputs=True, sample=s, inputs={"tuned-1": "tuned-2"}
            ),
            UncheckedError,
        ).endswith(
            " of tuned-1 is not the one that was merged, by its hash in the lock; expected the same model. Say where that is with "
            "--input tuned-1=PATH."
        )
    save_model(Path("tuned-1"), {"w": ("F32", np.zeros((2, 2)))})
    assert told(lambda: alnico.verify("out", against_inputs=True), UncheckedError).startswith(
        "out/alnico.lock.json: could not be planned again from its inputs: "
    )
    assert told(
        lambda: alnico.verify("out", against_inputs=True, inputs={"tuned-9": "moved"}), ModelError
    ) == (
        "input 'tuned-9': is not in out/alnico.lock.json; it lists tuned-0, tuned-1, base. Check the name before the =."
    )


def test_inputs_are_found_beside_the_output_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alnico.merge(TIES, "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert alnico.verify("../out", against_inputs=True).recomputed.tensors == 20


def test_parts_of_an_adapted_model_and_statistics_may_have_moved() -> None:
    every = recipes()
    alnico.merge(every["an adapter"], "adapted")
    alnico.merge(every["fisher"], "fished")
    Path("tuned-0").rename("tuned+0")
    alnico.merge({"merge_method": "linear", "models": ["tuned+0"]}, "plus")
    Path("tuned+0").rename("tuned-0")
    assert alnico.verify("plus", against_inputs=True, inputs={"tuned+0": "tuned-0"}).recomputed.tensors == 20
    Path("adapter").rename("lora")
    (statistics,) = Path().glob("tuned-1-fisher*")
    statistics.rename("information")
    assert alnico.verify("adapted", against_inputs=True, inputs={"adapter": "lora"}).recomputed.tensors == 20
    assert (
        alnico.verify(
            "fished", against_inputs=True, inputs={str(statistics): "information"}
        ).recomputed.tensors
        == 20
    )
    assert "could not be planned again" in told(
        lambda: alnico.verify("fished", against_inputs=True), UncheckedError
    )


def test_bits_of_another_arithmetic_are_not_compared() -> None:
    alnico.merge(TIES, "out")
    edit_lock(lambda lock: lock.update(arithmetic=0, alnico="0.0.1"))
    assert alnico.verify("out").unchecked == ()
    assert told(lambda: alnico.verify("out", against_inputs=True), UncheckedError) == (
        f"out/alnico.lock.json: was merged by alnico 0.0.1 with arithmetic 0, here it is {ARITHMETIC}: the same recipe has other bits. Use alnico 0.0.1."
    )


def test_a_recipe_in_the_lock_that_cannot_be_read_is_no_pass() -> None:
    alnico.merge(TIES, "out")
    edit_lock(lambda lock: lock["recipe"].update(merge_method="later"))
    assert told(lambda: alnico.verify("out", against_inputs=True), UncheckedError).startswith(
        "out/alnico.lock.json: its recipe needs the merge method later, which this version of alnico does not have"
    )


def test_a_merge_is_verified_inside_the_budget_or_refused() -> None:
    alnico.merge(TIES, "out")
    with pytest.raises(AlnicoError, match="plan: the merge needs at least"):
        alnico.verify("out", against_inputs=True, memory="64MiB")
