"""Compressed task vectors: held against a float64 SVD, sizes and errors against the files, and used as any task vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import alnico
from alnico import TaskVector
from alnico.errors import AlnicoError, ModelError, RecipeError, ResourceError
from alnico.values.compression import Compression

SHAPES = {
    "embed_tokens.weight": (30, 12),
    "layers.0.up.weight": (40, 24),
    "layers.0.down.weight": (24, 40),
    "layers.0.up.bias": (40,),
    "layers.0.norm.weight": (24,),
    "layers.1.experts": (3, 40, 32),
    "conv.weight": (16, 8, 3, 3),
    "narrow.weight": (1, 24),
}
MATRICES = ("layers.0.up.weight", "layers.0.down.weight", "layers.1.experts", "conv.weight")
Tensors = dict[str, np.ndarray]


@pytest.fixture
def pair() -> tuple[Tensors, Tensors]:
    random = np.random.default_rng(0)
    base = {n: random.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    tuned = {n: (v + 0.1 * random.normal(size=v.shape)).astype(np.float32) for n, v in base.items()}
    tuned["whole"] = base["whole"] = np.arange(3)
    return tuned, base


def flat(values: np.ndarray) -> np.ndarray:
    """A tensor as a stack of matrices (stack, rows, columns)."""
    return values if values.ndim == 3 else values.reshape(1, len(values), -1)


def best(values: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of each matrix of a tensor, in float64."""
    u, s, vt = np.linalg.svd(flat(values.astype(np.float64)), full_matrices=False)
    found: np.ndarray = (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
    return found.reshape(values.shape)


def difference(pair: tuple[Tensors, Tensors], name: str) -> np.ndarray:
    tuned, base = pair
    found: np.ndarray = (tuned[name].astype(np.float64) - base[name]).astype(np.float32)
    return found


@pytest.mark.parametrize("share", [1 / 8, 0.25, 0.4])
def test_each_matrix_is_its_best_approximation_and_everything_else_is_whole(
    pair: tuple[Tensors, Tensors], tmp_path: Path, share: float
) -> None:
    found = TaskVector(*pair).compress(tmp_path / "t.safetensors", rank=share)
    loaded = TaskVector.load(tmp_path / "t.safetensors").state_dict()
    assert loaded.keys() == SHAPES.keys()
    for tensor in found.tensors:
        expected = difference(pair, tensor.name)
        if tensor.name not in MATRICES:
            np.testing.assert_array_equal(loaded[tensor.name], expected)
            assert (tensor.rank, tensor.error, tensor.bytes) == (None, 0, tensor.whole_bytes)
            continue
        rank = max(int(share * min(flat(expected).shape[1:])), 1)
        assert tensor.rank == rank
        assert loaded[tensor.name].shape == tensor.shape == SHAPES[tensor.name]
        np.testing.assert_allclose(loaded[tensor.name], best(expected, rank), atol=1e-6)


def test_the_error_and_the_size_are_those_of_the_files(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    found = TaskVector(*pair).compress(file, rank=0.25)
    loaded = TaskVector.load(file).state_dict()
    lost = squares = 0.0
    for tensor in found.tensors:
        exact = difference(pair, tensor.name).astype(np.float64)
        error, norm = np.linalg.norm(exact - loaded[tensor.name].numpy()), np.linalg.norm(exact)
        assert tensor.error == pytest.approx(error / norm, rel=1e-9, abs=1e-15)
        assert tensor.whole_bytes == 4 * exact.size
        lost, squares = lost + error**2, squares + norm**2
    assert found.error == pytest.approx(np.sqrt(lost / squares), rel=1e-9)
    stored = load_file(file)
    assert found.bytes == sum(t.bytes for t in found.tensors) == sum(v.nbytes for v in stored.values())
    assert found.whole_bytes == 4 * sum(np.prod(s) for s in SHAPES.values())
    assert found.share == found.bytes / found.whole_bytes < 1
    assert repr(found) == (
        f"<compressed task vector in {file}: {found.bytes / 1e3:.1f} kB, {found.share:.1%} of {found.whole_bytes / 1e3:.1f} kB; "
        f"4 tensors of 8 in factors; relative error {found.error:.3g}>"
    )
    with safe_open(file, "np") as opened:
        assert opened.metadata()["alnico.compressed"] == "rank 0.25"
        assert opened.metadata()["alnico.kind"] == "task vector"


@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_a_share_of_the_squares_takes_as_few_singular_vectors_as_possible(
    pair: tuple[Tensors, Tensors], tmp_path: Path, energy: float
) -> None:
    found = TaskVector(*pair).compress(tmp_path / "t", energy=energy)
    for tensor in found.tensors:
        if tensor.name not in MATRICES:
            continue
        values = np.linalg.svd(flat(difference(pair, tensor.name).astype(np.float64)), compute_uv=False)
        shares = np.cumsum(values**2, 1) / (values**2).sum(1, keepdims=True)
        rank = int((shares < energy * (1 - 1e-9)).sum(1).max()) + 1
        rows, columns = flat(difference(pair, tensor.name)).shape[1:]
        if rank * (rows + columns) >= rows * columns:
            assert (tensor.rank, tensor.error) == (None, 0)
        else:
            assert tensor.rank == rank
    assert found.error**2 <= 1 - energy + 1e-9


def test_factors_of_a_stack_have_one_rank_and_each_matrix_its_share(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    thin = random.normal(size=(40, 2)) @ random.normal(size=(2, 40))
    stack = np.stack([thin, random.normal(size=(40, 40))])
    zeros = {"experts": np.zeros(stack.shape)}
    found = TaskVector({"experts": stack}, zeros).compress(tmp_path / "t.safetensors", energy=0.5)
    loaded = TaskVector.load(tmp_path / "t.safetensors")["experts"]
    assert loaded.dtype == torch.float64
    for matrix, own in zip(stack, loaded.numpy(), strict=True):
        values = np.linalg.svd(matrix, compute_uv=False)
        rank = int(np.searchsorted(np.cumsum(values**2), 0.5 * (values**2).sum())) + 1
        np.testing.assert_allclose(own, best(matrix, rank), atol=1e-9)
    assert found.tensors[0].rank == max(np.linalg.matrix_rank(loaded))


def test_tables_are_matrices_on_request(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    found = TaskVector(*pair).compress(tmp_path / "t", rank=0.2, embeddings="matrix")
    assert [t.rank for t in found.tensors if t.name == "embed_tokens.weight"] == [2]


def test_a_tensor_of_zeros_stays_zero_and_loses_nothing(tmp_path: Path) -> None:
    base = {"w.weight": np.ones((20, 20), np.float32)}
    found = TaskVector(base, dict(base)).compress(tmp_path / "t.safetensors", rank=0.3)
    assert found.error == found.tensors[0].error == 0
    assert not TaskVector.load(tmp_path / "t.safetensors")["w.weight"].any()


def test_a_table_that_did_not_change_takes_no_room(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    base = {"embed_tokens.weight": random.normal(size=(500, 24)), "bias": np.ones(4)}
    found = TaskVector({**base, "bias": np.zeros(4)}, base).compress(tmp_path / "t.safetensors", rank=0.5)
    assert found.bytes == 8 * (500 + 24 + 4)
    loaded = TaskVector.load(tmp_path / "t.safetensors").state_dict()
    assert loaded["embed_tokens.weight"].shape == (500, 24)
    assert not loaded["embed_tokens.weight"].any()
    assert (loaded["bias"] == -1).all()
    assert found.error == 0


def test_a_compressed_task_vector_is_used_as_any_other(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    tuned, base = pair
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    TaskVector(tuned, base).compress(tmp_path / "folder", rank=0.25)
    tau = TaskVector.load(tmp_path / "folder")
    whole = {
        n: best(difference(pair, n), t) if t else difference(pair, n) for n, t in ranks(tmp_path).items()
    }
    assert tau.norm() == pytest.approx(
        np.sqrt(sum((v.astype(np.float64) ** 2).sum() for v in whole.values()))
    )
    assert 0 < tau.cosine(TaskVector(tuned, base)) < 1
    (0.5 * tau).on(tmp_path / "base.safetensors").save(tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, values in whole.items():
        np.testing.assert_allclose(merged[name], base[name] + 0.5 * values, atol=1e-6)
    np.testing.assert_array_equal(merged["whole"], base["whole"])
    by_tsv = alnico.merge_state_dicts([tau.on(base), tuned], "tsv", base=base)
    expected = alnico.merge_state_dicts([tau.on(base).state_dict(), tuned], "tsv", base=base)
    for name in SHAPES:
        np.testing.assert_allclose(by_tsv[name], expected[name], atol=1e-6)


def ranks(folder: Path) -> dict[str, int]:
    """The rank of each tensor in a folder; 0 if it is whole."""
    stored = load_file(folder / "folder" / "model.safetensors")
    return {n: stored[f"{n}:left"].shape[-1] if f"{n}:left" in stored else 0 for n in SHAPES}


def test_a_part_of_a_matrix_is_read_with_the_same_bits(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    from alnico.checkpoint.open_model import open_model
    from alnico.values.expanded_task_vector import expanded

    TaskVector(*pair).compress(tmp_path / "t.safetensors", rank=0.25)
    source = expanded(open_model(tmp_path / "t.safetensors", may_be_adapter=True))
    try:
        for name in MATRICES:
            size = source.tensors[name].byte_size
            whole = bytearray(size)
            source.read_into(name, 0, memoryview(whole))
            for first, last in ((0, 7), (3, 11), (size // 2 - 5, size // 2 + 401), (size - 9, size)):
                part = bytearray(last - first)
                source.read_into(name, first, memoryview(part))
                assert part == whole[first:last]
    finally:
        source.close()


def test_threads_and_shards_change_no_bit(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    tau = TaskVector(*pair)
    one = tau.compress(tmp_path / "one.safetensors", energy=0.6, threads=1)
    tau.compress(tmp_path / "two.safetensors", energy=0.6, threads=3)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    many = tau.compress(tmp_path / "many", energy=0.6, max_shard_size=8000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert many.tensors == one.tensors
    assert TaskVector.load(tmp_path / "many").equals(TaskVector.load(tmp_path / "one.safetensors"))


def test_nothing_is_left_after_an_error(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    tuned, base = pair
    tuned["layers.0.down.weight"][3, 5] = np.nan
    with pytest.raises(AlnicoError, match=r"layers\.0\.down\.weight\[3, 5\] is NaN"):
        TaskVector(tuned, base).compress(tmp_path / "t", rank=0.25)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "neither rank nor energy is given; expected one of the two. rank=0.125 keeps an eighth of all singular vectors, "
            "energy=0.9 as many as hold 0.9 of the squares.",
        ),
        ({"rank": 0.0}, "rank is 0; expected a share in (0, 1]."),
        ({"energy": 1.5}, "energy is 1.5; expected a share in (0, 1]."),
        (
            {"rank": 0.5, "embeddings": "sum"},
            "embeddings is 'sum'; expected whole or matrix. Choose one.",
        ),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_an_error(
    pair: tuple[Tensors, Tensors], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        TaskVector(*pair).compress(tmp_path / "t", **options)
    assert str(caught.value) == message


def test_a_matrix_beyond_the_memory_is_refused_with_what_it_needs(
    pair: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match=r"^compress: .* Raise memory to \d+MiB\.$") as caught:
        TaskVector(*pair).compress(tmp_path / "t", rank=0.25, memory="10MiB")
    enough = str(caught.value).rpartition("to ")[2].removesuffix(".")
    assert isinstance(TaskVector(*pair).compress(tmp_path / "t", rank=0.25, memory=enough), Compression)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"conv.weight:right": None}, "conv.weight has one factor; expected two"),
        (
            {"conv.weight:right": np.ones((9, 8, 3, 3), np.float32)},
            r"conv.weight has factors of \(16, 4\) and \(9, 8, 3, 3\); expected \(rows, k\) and \(k, columns\)",
        ),
        (
            {"conv.weight:right": np.ones((4, 8, 3, 3), np.float64)},
            "conv.weight has factors of F32 and F64; expected both F32, or both F64",
        ),
        (
            {"conv.weight": np.ones((16, 8, 3, 3), np.float32)},
            "conv.weight is stored whole and in factors; expected one of the two",
        ),
    ],
    ids=["one factor", "shapes", "dtypes", "twice"],
)
def test_a_file_whose_factors_do_not_fit_is_refused(
    pair: tuple[Tensors, Tensors], tmp_path: Path, change: dict[str, np.ndarray | None], found: str
) -> None:
    TaskVector(*pair).compress(tmp_path / "t.safetensors", rank=0.25)
    with safe_open(tmp_path / "t.safetensors", "np") as opened:
        metadata = opened.metadata()
    stored = load_file(tmp_path / "t.safetensors") | change
    save_file({n: v for n, v in stored.items() if v is not None}, tmp_path / "t.safetensors", metadata)
    with pytest.raises(ModelError, match=f"{found} in a compressed task vector. Compress it again.$"):
        TaskVector.load(tmp_path / "t.safetensors").state_dict()


def test_a_name_that_a_factor_would_have_is_refused(tmp_path: Path) -> None:
    tuned = {n: np.random.default_rng(3).normal(size=(20, 20)) for n in ("a", "a:left")}
    tau = TaskVector(tuned, {n: np.zeros_like(v) for n, v in tuned.items()})
    with pytest.raises(
        AlnicoError, match=r"^a:left: is a tensor of the task vector, and a factor of a would"
    ):
        tau.compress(tmp_path / "t", rank=0.1)
