"""Modules on a GPU are those that transformers loads in the checkpoint's dtype; made GPUs are torch's processor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertModel, LlamaConfig, LlamaForCausalLM

from alnico.devices import Device, made_gpus
from alnico.errors import NonFiniteError, ResourceError
from alnico.evaluation import live_module
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.loaded_model import load_module, open_subject
from alnico.evaluation.memory_subject import MemorySubject
from alnico.evaluation.module_places import places
from alnico.evaluation.placement import ModulePlacement
from alnico.recipe.load import load_recipe
from made import family
from made_tasks import Made

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch

GPU = Device("cuda:0", "Made", 8 << 30)
OTHER = Device("cuda:1", "Made", 8 << 30)


def on(*gpus: Device, dtype: str = "auto") -> ModulePlacement:
    return ModulePlacement(gpus, dtype)


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)]
)
def test_a_gpu_loads_a_checkpoint_in_its_own_dtype(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    base, _ = family(tmp_path, 1, dtype=dtype, vocabulary=64)
    with made_gpus([GPU]):
        module = load_module(base, "causal", "base", placement=on(GPU))
    assert {p.dtype for p in module.parameters()} == {expected}
    assert not module.training
    assert same(module, AutoModelForCausalLM.from_pretrained(base, dtype=expected))


def test_the_placement_may_name_the_dtype(made: Made) -> None:
    with made_gpus([GPU]):
        module = load_module(made.base, "encoder", "base", placement=on(GPU, dtype="bfloat16"))
    assert same(module, AutoModel.from_pretrained(made.base, dtype=torch.bfloat16))
    on_the_processor = load_module(made.base, "encoder", "base", placement=ModulePlacement(dtype="bfloat16"))
    assert same(module, on_the_processor)


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU, and becomes no array."""

    is_cuda = True

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_a_module_on_a_gpu_follows_merges_of_another_dtype_there(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.zeros(2, 3).as_subclass(OnCuda)
    module = SimpleNamespace(state_dict=lambda **_: {"w": own}, base_model_prefix="model", eval=lambda: None)
    monkeypatch.setattr(live_module, "load_state", lambda *_, **__: (module, frozenset()))
    state = {"w": torch.zeros(2, 3, dtype=torch.bfloat16).as_subclass(OnCuda)}
    live = live_module.LiveModule({}, state, "causal", "m", placement=on(GPU, dtype="float32"))
    (values,) = live.followers["w"]
    values[:] = 2.0
    assert own.tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_candidates_on_a_gpu_follow_the_merges_in_their_dtype(
    dtype: str, expected: torch.dtype, tmp_path: Path
) -> None:
    base, tuned = family(tmp_path, 2, dtype="BF16", vocabulary=64)
    names = [str(t) for t in tuned]
    placement = on(GPU, dtype=dtype)
    with made_gpus([GPU]), Candidates([*names, str(base)], placement=placement) as candidates:
        modules = []
        for weight in (0.3, 0.9):
            recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": names, "parameters": {"weight": weight}}  # fmt: skip
            candidate = candidates.make(load_recipe(recipe))
            modules.append(candidate.module("causal"))
            values = modules[-1].state_dict()
            assert all(torch.equal(values[n], v.to(expected)) for n, v in candidate.state().items())
            assert {p.dtype for p in modules[-1].parameters()} == {expected}
        assert modules[0] is modules[1]


def llama(layers: int = 4) -> torch.nn.Module:
    """A Llama on ``meta``."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=layers, **sizes))


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def gpus_with(*rooms: int) -> tuple[list[Device], list[int]]:
    """GPUs that have so much room for a module, and what is free on them."""
    gpus = [Device(f"cuda:{i}", "Made", 10 * room, f"gpu:{i}") for i, room in enumerate(rooms)]
    return gpus, [2 * room for room in rooms]  # a tenth of all is kept


def test_a_module_is_whole_on_the_first_gpu_with_room() -> None:
    module = llama()
    needed = bytes_of(module)
    for rooms, place in (((needed,), 0), ((needed - 1, needed), 1), ((needed, needed), 0)):
        assert places(module, needed, "float32", *gpus_with(*rooms), "m") == {"": f"gpu:{place}"}


def test_a_module_that_fits_on_none_is_spread_in_whole_layers() -> None:
    module = llama()
    needed = bytes_of(module)
    found = places(module, needed, "float32", *gpus_with(400_000, 400_000), "m")
    layers = {part: place for part, place in found.items() if ".layers." in part}
    assert set(layers) == {f"model.layers.{i}" for i in range(4)}
    assert list(layers.values()) == sorted(layers.values())
    for place in ("gpu:0", "gpu:1"):
        held = [module.get_submodule(part) for part, where in found.items() if where == place]
        assert 0 < sum(map(bytes_of, held)) <= 400_000
    parts = {
        p for part in found for p in (f"{part}.{n}" for n, _ in module.get_submodule(part).named_parameters())
    }
    assert parts == {n for n, _ in module.named_parameters()}


def test_gpus_without_room_are_told_with_their_figures() -> None:
    module = llama()
    needed = bytes_of(module)
    gpus, free = gpus_with(300_000, 300_000)
    with made_gpus(gpus), pytest.raises(ResourceError) as caught:
        places(module, needed, "float32", gpus[:1], free[:1], "m")
    assert str(caught.value) == (
        "m: needs 708.9 kB of GPU memory in float32, and cuda:0 (Made, 3.0 MB) has room for 300.0 kB; expected room for the "
        "whole model. Choose device cuda:all, which spreads the module over all GPUs, or cpu, or dtype bfloat16."
    )
    with pytest.raises(ResourceError) as caught:
        places(module.to(torch.bfloat16), needed // 2, "bfloat16", *gpus_with(100_000, 90_000), "m")
    assert str(caught.value) == (
        "m: needs 354.4 kB of GPU memory in bfloat16, and cuda:0 (Made, 1.0 MB) has room for 100.0 kB and cuda:1 (Made, "
        "900.0 kB) has room for 90.0 kB; expected room for the whole model. Choose device cpu."
    )


def test_the_headers_refuse_a_checkpoint_before_it_is_loaded(tmp_path: Path) -> None:
    base, _ = family(tmp_path, 1, dtype="BF16", vocabulary=64)
    small = Device("cuda:0", "Made", 1000)
    with made_gpus([small]), pytest.raises(ResourceError, match=r"has room for 900 B; expected room"):
        open_subject(base, placement=on(small)).module("causal")


def test_a_spread_checkpoint_scores_as_a_whole_one(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 1, dtype="BF16", vocabulary=64, layers=4)
    whole = load_module(base, "causal", "base", placement=ModulePlacement(dtype="bfloat16"))
    stored = sum(p.numel() * 2 for p in whole.parameters())
    gpus = [Device(f"cuda:{i}", "Made", stored) for i in range(3)]
    with made_gpus(gpus):
        spread = load_module(base, "causal", "base", placement=on(*gpus))
        with Candidates([str(tuned[0])], placement=on(*gpus)) as candidates:
            recipe = load_recipe({"merge_method": "passthrough", "models": [str(tuned[0])]})
            module = candidates.make(recipe).module("causal")
            assert same(
                module, load_module(tuned[0], "causal", "one", placement=ModulePlacement(dtype="bfloat16"))
            )
    assert same(spread, whole)
    tokens = torch.arange(12)[None]
    assert torch.equal(spread(tokens).logits, whole(tokens).logits)


def test_the_copy_of_a_module_moves_and_the_original_stays() -> None:
    module = torch.nn.Linear(4, 3).double().eval()
    with made_gpus([GPU]):
        subject = MemorySubject("m", module, placement=on(GPU, dtype="bfloat16"))
        kept = MemorySubject("m", module, placement=on(GPU))
        assert subject.model().weight.dtype == torch.bfloat16
        assert kept.model().weight.dtype == torch.float64
    assert module.weight.dtype == torch.float64
    small = Device("cuda:0", "Made", 100)
    with (
        made_gpus([small]),
        pytest.raises(ResourceError, match=r"^m: needs 120 B of GPU memory in float64, and "),
    ):
        MemorySubject("m", module, placement=on(small)).model()


def test_a_gpu_that_is_full_while_a_model_is_loaded_is_told(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(BertModel, "from_pretrained", full)
    with made_gpus([GPU]), pytest.raises(ResourceError) as caught:
        load_module(made.base, "encoder", "base", placement=on(GPU))
    assert str(caught.value) == (
        "base: the GPU has too little memory for it (CUDA out of memory. Tried to allocate 2.00 GiB); expected room for the "
        "whole model. End other programs that use the GPU, or choose another device or a smaller dtype."
    )


def test_numbers_beyond_float16_are_told(made: Made, tmp_path: Path) -> None:
    module = BertModel.from_pretrained(made.base)
    module.embeddings.word_embeddings.weight.data[3, 2] = 1e5
    module.save_pretrained(tmp_path / "large")
    with made_gpus([GPU]), pytest.raises(NonFiniteError) as caught:
        load_module(tmp_path / "large", "encoder", "large", placement=on(GPU, dtype="float16"))
    assert str(caught.value) == (
        "embeddings.word_embeddings.weight[3, 2]: large has an infinity; expected finite numbers. Repair or exclude this "
        "model. If its own dtype is another one, its numbers may be too large for float16: choose dtype bfloat16."
    )
