"""Creating stored task vectors: what is written decodes to what was measured, by numpy and safetensors alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from alnico.checkpoint.task_vectors.manifest import Manifest, TensorEntry, read_manifest
from alnico.numerics.dtypes import decode
from alnico.store.create import Created, create_vector
from alnico.store.target import Target
from made import Tensors, encoded, save_file

LINEAR = "model.layers.0.self_attn.q_proj.weight"


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made_models(
    dtype: str = "BF16",
) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, tuple[str, np.ndarray]]]:
    """A base and a fine-tune: matrices changed at low rank, a table, a sparse change, an unchanged one, integers."""
    base: dict[str, tuple[str, np.ndarray]] = {
        "model.embed_tokens.weight": (dtype, numbers(1, 200, 48)),
        LINEAR: (dtype, numbers(2, 96, 48)),
        "model.layers.0.mlp.up_proj.weight": (dtype, numbers(3, 72, 48)),
        "model.layers.0.input_layernorm.weight": (dtype, numbers(4, 48)),
        "model.norm.weight": (dtype, np.ones(48, np.float32)),
        "position_ids": ("I64", np.arange(7)),
    }
    tuned = dict(base)
    change = numbers(5, 96, 2) @ numbers(6, 2, 48) * np.float32(0.05)
    tuned[LINEAR] = (dtype, base[LINEAR][1] + change)
    tuned["model.embed_tokens.weight"] = (
        dtype,
        base["model.embed_tokens.weight"][1] + 0.03 * numbers(7, 200, 48),
    )
    sparse = base["model.layers.0.mlp.up_proj.weight"][1].copy()
    sparse[3, 4], sparse[50, 7], sparse[71, 47] = 2.5, -1.5, 0.25
    tuned["model.layers.0.mlp.up_proj.weight"] = (dtype, sparse)
    tuned["model.layers.0.input_layernorm.weight"] = (
        dtype,
        base["model.layers.0.input_layernorm.weight"][1] + np.float32(0.5),
    )
    return base, tuned


def save_model(folder: Path, tensors: Tensors) -> Path:
    save_file(folder / "model.safetensors", tensors)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 200}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base, tuned = made_models()
    return save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base)


def made(models: tuple[Path, Path], folder: Path, **target: Any) -> Created:
    return create_vector(*models, folder, name="sql", target=Target(**target))


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the files of a task vector, read by the safetensors package; BF16 as float32."""
    import torch

    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                wide = value.to(torch.float32) if value.dtype == torch.bfloat16 else value
                tensors[name] = wide.numpy()
    return tensors


def difference_of(entry: TensorEntry, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The difference that an arithmetic encoding stores, in float64, by the definition of the format."""
    get = {part: parts[name] for part, name in entry.stored.items()}
    if entry.encoding == "difference":
        return entry.scale * get["values"].astype(np.float64)
    if entry.encoding == "low_rank":
        return (get["left"].astype(np.float64) @ get["right"].astype(np.float64)).reshape(entry.shape)
    flat = np.zeros(entry.elements)
    if entry.encoding == "top_k":
        flat[get["indices"]] = entry.scale * get["values"].astype(np.float64)
    elif entry.encoding == "sign":
        bits = np.unpackbits(get["bits"], bitorder="little")[: entry.elements]
        signs = np.where(bits, 1.0, -1.0).reshape(len(get["scales"]), -1)
        flat = (get["scales"].astype(np.float64)[:, None] * signs).reshape(-1)
    elif entry.encoding == "int4":
        codes = np.stack([get["codes"] & 15, get["codes"] >> 4], 1).reshape(-1)[: entry.elements]
        group = np.arange(entry.elements) // 128
        flat = get["minimums"].astype(np.float64)[group] + get["scales"].astype(np.float64)[group] * codes
    else:
        raise AssertionError(entry.encoding)
    return flat.reshape(entry.shape)


def restored(manifest: Manifest, folder: Path, base: Tensors) -> dict[str, np.ndarray]:
    """The fine-tune of an exact task vector, as raw bytes."""
    raw: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("taskvector*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                raw[name] = np.frombuffer(data[8 + length + begin : 8 + length + end], np.uint8)
    result = {}
    for name, entry in manifest.tensors.items():
        parts = {part: raw[at] for part, at in entry.stored.items()}
        if entry.encoding == "whole":
            result[name] = parts["values"]
            continue
        own = np.frombuffer(encoded(*base[name]), np.uint8).copy()
        if entry.encoding == "sparse":
            indices = parts["indices"].view(np.int32)
            assert (np.diff(indices) > 0).all()
            width = own.size // entry.elements
            own.reshape(-1, width)[indices] = parts["values"].reshape(-1, width)
        else:
            assert entry.encoding == "absent"
        result[name] = own
    return result


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("target", [{}, {"exact": True}, {"encoding": "whole"}, {"encoding": "sparse"}])
def test_exact_encodings_give_every_bit_of_the_fine_tune_back(
    tmp_path: Path, dtype: str, target: dict[str, Any]
) -> None:
    base, tuned = made_models(dtype)
    models = (save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base))
    created = made(models, tmp_path / "vector", **target)
    assert created.manifest.is_exact
    assert created.manifest.error == 0
    found = restored(read_manifest(tmp_path / "vector"), tmp_path / "vector", base)
    assert found.keys() == tuned.keys()
    for name, values in tuned.items():
        assert found[name].tobytes() == encoded(*values), name


def test_an_exact_task_vector_stores_what_changed_in_the_smallest_way(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    manifest = made(models, tmp_path / "vector", exact=True).manifest
    assert {n: t.encoding for n, t in manifest.tensors.items()} == {
        "model.embed_tokens.weight": "whole",
        LINEAR: "whole",
        "model.layers.0.mlp.up_proj.weight": "sparse",
        "model.layers.0.input_layernorm.weight": "whole",
        "model.norm.weight": "absent",
        "position_ids": "absent",
    }
    files = stored(tmp_path / "vector")
    up = "model.layers.0.mlp.up_proj.weight"
    assert files[f"{up}.indices"].tolist() == [3 * 48 + 4, 50 * 48 + 7, 71 * 48 + 47]
    assert files[f"{up}.values"].tolist() == [2.5, -1.5, 0.25]


ARITHMETIC = [
    "difference",
    "difference:f16",
    "difference:bf16",
    "top_k:0.1",
    "top_k:1",
    "sign",
    "int4",
    "low_rank:4",
]


@pytest.mark.parametrize("encoding", ARITHMETIC)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_recorded_errors_and_norms_are_those_of_what_is_stored(
    tmp_path: Path, encoding: str, dtype: str
) -> None:
    base, tuned = made_models(dtype)
    models = (save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base))
    made(models, tmp_path / "vector", encoding=encoding)
    manifest, files = read_manifest(tmp_path / "vector"), stored(tmp_path / "vector")
    arithmetic = {
        n: e for n, e in manifest.tensors.items() if e.encoding not in ("absent", "sparse", "whole")
    }
    assert len(arithmetic) == 4
    lost, norms = [], []
    for name, entry in arithmetic.items():
        true = [
            decode(np.frombuffer(encoded(*m[name]), np.uint8), dtype).astype(np.float64)
            for m in (tuned, base)
        ]
        difference = (true[0] - true[1]).reshape(entry.shape)
        norm = float(np.linalg.norm(difference))
        error = float(np.linalg.norm(difference_of(entry, files) - difference))
        assert entry.norm == pytest.approx(norm, rel=1e-12)
        assert entry.error == pytest.approx(error / norm, rel=1e-6, abs=1e-15)
        assert entry.byte_size == sum(
            len(encoded_part(tmp_path / "vector", name)) for name in entry.stored.values()
        )
        lost.append(error)
        norms.append(norm)
    assert manifest.error == pytest.approx(
        float(np.linalg.norm(lost) / np.linalg.norm(norms)), rel=1e-6, abs=1e-15
    )


def encoded_part(folder: Path, name: str) -> bytes:
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if (entry := json.loads(data[8 : 8 + length]).get(name)) is not None:
            begin, end = entry["data_offsets"]
            return data[8 + length + begin : 8 + length + end]
    raise AssertionError(name)


def test_signs_and_their_scales_are_those_of_the_difference(tmp_path: Path) -> None:
    base = {"w": ("F32", np.ones((2, 300), np.float32)), "v": ("F32", np.zeros((3, 3), np.float32))}
    changes = np.where(np.arange(600) % 3 == 0, 1.0, -2.0).astype(np.float32).reshape(2, 300) * np.array(
        [[1], [4]], np.float32
    )
    small = np.array([[1, -1, 1], [0, 0, 2], [-2, -2, 0]], np.float32)
    tuned = {"w": ("F32", base["w"][1] + changes), "v": ("F32", small)}
    models = (save_model(tmp_path / "t", tuned), save_model(tmp_path / "b", base))
    made(models, tmp_path / "vector", encoding="sign")
    files = stored(tmp_path / "vector")
    assert files["w.sign_scales"].tolist() == [pytest.approx(5 / 3), pytest.approx(20 / 3)]
    assert files["v.sign_scales"].tolist() == [1.0]  # short rows share one
    for name, difference in (("w", changes), ("v", small)):
        bits = np.unpackbits(files[f"{name}.signs"], bitorder="little")[: difference.size]
        assert bits.astype(bool).tolist() == (difference.reshape(-1) > 0).tolist()


def test_the_largest_entries_are_kept_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    base = {"w": ("F32", np.zeros((4, 4), np.float32))}
    values = np.array([1, -3, 2, 0, 3, 1, -1, 0, 0, 5, 2, 2, 0, 0, 0, -2], np.float32).reshape(4, 4)
    models = (save_model(tmp_path / "t", {"w": ("F32", values)}), save_model(tmp_path / "b", base))
    made(models, tmp_path / "vector", encoding="top_k:0.25")
    files = stored(tmp_path / "vector")
    assert files["w.top_k.indices"].tolist() == [1, 2, 4, 9]  # 5, two of 3, and the first of the four of 2
    scale = read_manifest(tmp_path / "vector").tensors["w"].scale
    assert (files["w.top_k.differences"] * scale).tolist() == [-3, 2, 3, 5]


def test_all_entries_of_top_k_never_store_a_zero(tmp_path: Path) -> None:
    base = {"w": ("F32", np.zeros((2, 8), np.float32))}
    values = np.zeros((2, 8), np.float32)
    values[1, 3] = 7
    models = (save_model(tmp_path / "t", {"w": ("F32", values)}), save_model(tmp_path / "b", base))
    made(models, tmp_path / "vector", encoding="top_k:1")
    assert stored(tmp_path / "vector")["w.top_k.indices"].tolist() == [11]


@pytest.mark.parametrize("error", [0.3, 0.1, 0.01, 1e-4, 0.0])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_an_error_holds_in_every_tensor(tmp_path: Path, error: float, dtype: str) -> None:
    base, tuned = made_models(dtype)
    models = (save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base))
    created = made(models, tmp_path / "vector", error=error)
    assert max(t.error for t in created.manifest.tensors.values()) <= error
    exact = made(models, tmp_path / "exact", exact=True)
    assert created.byte_size <= exact.byte_size


def test_a_matrix_of_low_rank_is_stored_by_its_factors_where_that_is_smallest(tmp_path: Path) -> None:
    base, tuned = made_models("F32")
    models = (save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base))
    entry = made(models, tmp_path / "vector", error=0.01).manifest.tensors[LINEAR]
    assert (entry.encoding, entry.byte_size) == ("low_rank", 2 * (96 + 48) * 4)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_size_holds_for_all_files_and_more_of_it_loses_less(tmp_path: Path, dtype: str) -> None:
    base, tuned = made_models(dtype)
    models = (save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base))
    before = 1.0
    for size in range(12_000, 76_000, 3_100):
        error = made(models, tmp_path / f"{size}", size=size).manifest.error
        total = sum(p.stat().st_size for p in (tmp_path / f"{size}").iterdir())
        assert total <= size
        assert error <= before
        before = error


def test_every_file_has_its_hash_and_the_manifest_is_all_there_is_besides(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    made(models, tmp_path / "vector", tsv=0.1)
    manifest = read_manifest(tmp_path / "vector")
    names = {p.name for p in (tmp_path / "vector").iterdir()}
    assert names == {
        "taskvector.json",
        "taskvector.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert names - {"taskvector.json"} == set(manifest.files)
    for name, file in manifest.files.items():
        data = (tmp_path / "vector" / name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_both_models_are_identified_by_the_hashes_of_their_files(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    manifest = made(models, tmp_path / "vector").manifest
    for identity, folder in zip((manifest.finetuned, manifest.base), models, strict=True):
        data = (folder / "model.safetensors").read_bytes()
        line = f"{hashlib.sha256(data).hexdigest()}  {len(data)}  model.safetensors\n"
        assert identity.root == hashlib.sha256(line.encode()).hexdigest()
        assert identity.files["model.safetensors"].sha256 == hashlib.sha256(data).hexdigest()
    assert (manifest.base.id, manifest.finetuned.id) == ("base", "tuned")


@pytest.mark.parametrize("target", [{}, {"error": 0.1}, {"size": 30_000}, {"tsv": 0.1}, {"encoding": "int4"}])
def test_threads_and_memory_change_no_byte(
    models: tuple[Path, Path], tmp_path: Path, target: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.run_options import RunOptions
    from alnico.store import create

    first = read_all(create_vector(*models, tmp_path / "a", name="x", target=Target(**target)).path)
    run = RunOptions.of(threads=1, memory="3GiB")
    second = read_all(create_vector(*models, tmp_path / "b", name="x", target=Target(**target), run=run).path)
    monkeypatch.setattr(create, "MOST_HELD", 1)  # a batch per tensor
    monkeypatch.setattr(create._Creation, "_is_spooled", lambda *_: True)
    third = read_all(create_vector(*models, tmp_path / "c", name="x", target=Target(**target)).path)
    assert first == second == third


def read_all(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_each_model_is_read_once(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.checkpoint.file_model import FileModel

    counts: dict[str, int] = {}
    read: Callable[..., None] = FileModel.read_into

    def counted(self: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        counts[self.label] = counts.get(self.label, 0) + len(buffer)
        read(self, name, offset, buffer)

    from alnico.store import weight_hashes

    whole, others = weight_hashes.open_binary, {"base": 0, "tuned": 0}

    class Counted:
        def __init__(self, path: Path) -> None:
            self.file, self.name = whole(path), path.parent.name

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, at: int) -> None:
            self.file.seek(at)

        def read(self, size: int) -> bytes:
            data = self.file.read(size)
            if self.name in others:
                others[self.name] += len(data)
            return data

    monkeypatch.setattr(FileModel, "read_into", counted)
    monkeypatch.setattr(weight_hashes, "open_binary", Counted)
    made(models, tmp_path / "vector", size=30_000)
    assert counts == {str(m): sum(len(encoded(*t)) for t in made_models()[0].values()) for m in models}
    # Besides the tensors, only the headers are read, for the hashes of the files.
    files = {m.name: (m / "model.safetensors").read_bytes() for m in models}
    assert others == {name: 8 + int.from_bytes(data[:8], "little") for name, data in files.items()}


def test_a_dry_run_measures_and_writes_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    created = create_vector(*models, tmp_path / "vector", name="sql", target=Target(tsv=0.1), dry_run=True)
    written = made(models, tmp_path / "other", tsv=0.1)
    assert created.path is None
    assert not (tmp_path / "vector").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "other", "tuned"]
    assert created.byte_size == written.byte_size
    assert created.options == written.options


def test_what_was_measured_is_right(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = made_models()
    measured = made(models, tmp_path / "vector").measured
    raw = {
        m: [np.frombuffer(encoded(*v), np.uint8).reshape(v[1].size, -1) for v in t.values()]
        for m, t in (("b", base), ("t", tuned))
    }
    changed = sum(int((x != y).any(1).sum()) for x, y in zip(raw["b"], raw["t"], strict=True))
    elements = sum(v[1].size for v in base.values())
    assert measured.elements == elements
    assert measured.equal_share == pytest.approx(1 - changed / elements)
    assert measured.effective_rank is not None
    assert 1 < measured.effective_rank < 3  # two directions, and three entries elsewhere


def test_the_table_says_what_each_encoding_costs_and_loses(models: tuple[Path, Path], tmp_path: Path) -> None:
    options = {o.encoding: o for o in made(models, tmp_path / "vector").options}
    for encoding in ("difference:bf16", "difference:f16", "int4", "sign", "top_k:0.1"):
        created = made(models, tmp_path / encoding.replace(":", ""), encoding=encoding)
        assert options[encoding].error == pytest.approx(created.manifest.error, rel=1e-6)
        assert not options[encoding].is_estimate
    assert options["exact"].byte_size == made(models, tmp_path / "exact", exact=True).byte_size


def test_indices_have_64_bits_where_32_would_overflow(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.store.encoders import encoded as encoders

    monkeypatch.setattr(encoders, "LONG_INDICES", 1000)
    made(models, tmp_path / "vector", exact=True)
    files = stored(tmp_path / "vector")
    up = "model.layers.0.mlp.up_proj.weight"
    assert files[f"{up}.indices"].dtype == np.int64
    assert files[f"{up}.indices"].tolist() == [3 * 48 + 4, 50 * 48 + 7, 71 * 48 + 47]


PEAK = """
import sys
from pathlib import Path
from alnico.run_options import RunOptions
from alnico.store.create import create_vector
from alnico.store.target import Target

target = eval(sys.argv[5], {"Target": Target})
run = RunOptions.of(memory=int(sys.argv[4]))
create_vector(sys.argv[1], sys.argv[2], Path(sys.argv[3]), name="x", target=target, run=run)
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("Target(size='60MB')", marks=pytest.mark.slow),
        pytest.param("Target(exact=True)", marks=pytest.mark.nightly),
        pytest.param("Target(encoding='int4')", marks=pytest.mark.nightly),
    ],
)
def test_the_memory_stays_in_the_budget(tmp_path: Path, target: str) -> None:
    """One tensor of 200 MB in each model, and many small ones."""
    base = {
        "big": ("F32", numbers(1, 5000, 10_000)),
        **{f"w{i}": ("F32", numbers(i, 512, 512)) for i in range(40)},
    }
    tuned = {n: (t, v + np.float32(0.01) * numbers(99, *v.shape)) for n, (t, v) in base.items()}
    models = [save_model(tmp_path / n, m) for n, m in (("tuned", tuned), ("base", base))]
    budget = 600 << 20
    words = [*map(str, models), str(tmp_path / "v"), str(budget), target]
    done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=True)
    print(f"{int(done.stdout) / 2**20:.0f} MiB of {budget / 2**20:.0f}")
    assert int(done.stdout) <= budget


def test_tensors_with_several_entries_in_a_byte_are_absent_or_whole(tmp_path: Path) -> None:
    def save(folder: Path, data: bytes) -> Path:
        header = json.dumps(
            {
                "w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
                "v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            }
        )
        header += " " * (-len(header) % 8)
        folder.mkdir()
        raw = len(header).to_bytes(8, "little") + header.encode() + data + bytes(4)
        (folder / "model.safetensors").write_bytes(raw)
        return folder

    base, same, other = (
        save(tmp_path / n, d) for n, d in (("base", b"abcd"), ("same", b"abcd"), ("other", b"abce"))
    )
    equal = create_vector(same, base, tmp_path / "v", name="x").manifest.tensors["w"]
    assert (equal.encoding, equal.dtype) == ("absent", "F4")
    changed = create_vector(other, base, tmp_path / "u", name="x").manifest.tensors["w"]
    assert changed.encoding == "whole"
    assert encoded_part(tmp_path / "u", "w") == b"abce"
