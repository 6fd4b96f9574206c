"""Writes checkpoints of four ranks with torch: ``python write_shards.py RANK FOLDER``, once for each rank.

Each way to divide tensors gives a distributed checkpoint, ``FOLDER/WAY``, and files of ranks, ``FOLDER/WAY-ranks``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

RANKS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
SHAPES = ((10, 3), (3,), (5, 2, 2), (1, 7), (8, 6), (9, 5), (2, 3, 4, 5))
GRID_SHAPES = ((10, 6), (4, 8), (7, 9, 2), (5, 3), (3, 3))
EVEN_SHAPES = ((8, 3), (16,), (4, 2, 5))


def tensors(shapes: tuple[tuple[int, ...], ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """The whole tensors of a way."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.weight": (torch.randn(shape, generator=draw) * 50).to(DTYPES[i % len(DTYPES)])
        for i, shape in enumerate(shapes)
    }


def network(seed: int = 0) -> torch.nn.Module:
    """A small network, in which each child is divided by itself."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Embedding(13, 8),
        torch.nn.Linear(8, 6),
        torch.nn.LayerNorm(6),
        torch.nn.Linear(6, 13, bias=False),
    )


def main(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    line = init_device_mesh("cpu", (RANKS,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))

    def save(way: str, state: dict[str, object], model: dict[str, object]) -> None:
        writer = HuggingFaceStorageWriter(
            str(folder / f"{way}-storage"),
            {name: 1 + i % 2 for i, name in enumerate(model)},
            save_distributed=True,
        )
        dcp.save(model, storage_writer=writer)
        dcp.save(state, checkpoint_id=folder / way)
        (folder / f"{way}-ranks").mkdir(exist_ok=True)
        torch.save(model, folder / f"{way}-ranks" / f"model_world_size_{RANKS}_rank_{rank}.pt")
        torch.save({"state": {}}, folder / f"{way}-ranks" / f"optim_world_size_{RANKS}_rank_{rank}.pt")
        dist.barrier()

    def divided(whole: dict[str, torch.Tensor], mesh, *placements) -> dict[str, object]:
        return {name: distribute_tensor(t, mesh, placements) for name, t in whole.items()}

    ways = {
        "rows": divided(tensors(SHAPES), line, Shard(0)),
        "columns": divided({n: t for n, t in tensors(SHAPES).items() if t.ndim > 1}, line, Shard(1)),
        "grid": divided(tensors(GRID_SHAPES), grid, Shard(0), Shard(1)),
        "turned": divided(tensors(GRID_SHAPES), grid, Shard(1), Shard(0)),
        "twice": divided(tensors(SHAPES), grid, Shard(0), Shard(0)),
        "replicas": divided(tensors(SHAPES), grid, Replicate(), Shard(0)),
    }
    for way, model in ways.items():
        whole = model | {"plain": torch.arange(5.0), "number": torch.tensor(7.0)}
        optimizer = {f"state.{n}.exp_avg": t for n, t in model.items()}
        save(
            way, {"model": whole, "optimizer": optimizer, "lr_scheduler": {"last_epoch": 3}, "step": 7}, whole
        )

    first, second = divmod(
        rank, 2
    )  # FSDP over tensor parallelism: the second dimension of the mesh divides first
    placed = (_StridedShard(0, split_factor=2), Shard(0))
    strided = {
        name: DTensor.from_local(
            t.chunk(2)[second].chunk(2)[first].clone(),
            grid,
            placed,
            run_check=False,
            shape=t.shape,
            stride=t.stride(),
        )
        for name, t in tensors(EVEN_SHAPES).items()
    }
    save("strided", {"model": strided}, strided)

    parts = {}
    for name, t in tensors(SHAPES).items():
        rows = torch.arange(t.shape[0]).chunk(RANKS)
        own = [r for i, r in enumerate(rows) if i == rank]
        local = [
            LocalShard.from_tensor_and_offsets(t[r], [int(r[0])] + [0] * (t.ndim - 1), rank) for r in own
        ]
        if len(rows) == RANKS:
            parts[name] = init_from_local_shards(local, t.shape)
    save("sharded", {"model": parts}, parts)

    (folder / "partial").mkdir(exist_ok=True)
    torch.save(
        {"w": DTensor.from_local(torch.ones(3), line, (Partial(),))}, folder / "partial" / f"{rank}.pt"
    )

    model = network()
    for child in model:
        fully_shard(child, mesh=line)
    fully_shard(model, mesh=line)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(13)).square().mean().backward()
    optimizer.step()
    state, optimizer_state = get_state_dict(model, optimizer)
    save("fsdp", {"model": state, "optimizer": optimizer_state}, state)
    whole = {name: t.full_tensor() for name, t in state.items()}
    if rank == 0:
        torch.save(whole, folder / "fsdp-whole.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
