"""Combined adapters in PEFT: what it loads gives the outputs of the base with the weighted sum of what it merges itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alnico.lora.combine import combine
from lora.peft_models import made_by_peft, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
CASES: dict[str, tuple[str, list[dict[str, Any]], list[float]]] = {
    "unequal ranks": (
        "llama",
        [{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}, {"r": 12, "lora_alpha": 6, "target_modules": "all-linear"}],
        [0.7, -0.4],
    ),
    "rsLoRA and patterns": (
        "llama",
        [
            {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEAR},
            {
                "r": 8, "lora_alpha": 8, "target_modules": LINEAR, "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 17},
                "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 32},
            },
        ],
        [0.5, 1.5],
    ),
    "embeddings and head": (
        "llama",
        [
            {"r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
            {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "down_proj"]},
        ],
        [1.0, 1.0],
    ),
    "saved": (
        "llama",
        [
            {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
            {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        ],
        [0.3, 0.7],
    ),
    "layers": (
        "llama",
        [
            {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
            {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        ],
        [0.3, 0.4],
    ),
    "BERT": (
        "bert",
        [{"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, {"r": 64, "lora_alpha": 16, "target_modules": ["query", "key"]}],
        [0.7, 0.7],
    ),
    "BERT, biases": (
        "bert",
        [
            {"r": 8, "lora_alpha": 16, "target_modules": ["query", "dense"], "bias": "all"},
            {"r": 4, "lora_alpha": 16, "target_modules": ["query", "dense"], "bias": "all"},
        ],
        [0.4, 0.6],
    ),
    "BERT, biases of the adapted": (
        "bert",
        [
            {"r": 8, "lora_alpha": 16, "target_modules": ["query", "dense"], "bias": "lora_only"},
            {"r": 4, "lora_alpha": 16, "target_modules": ["query", "dense"], "bias": "lora_only"},
        ],
        [0.4, 0.6],
    ),
    "BERT, lora biases": (
        "bert",
        [
            {"r": 8, "lora_alpha": 16, "target_modules": ["query"], "lora_bias": True},
            {"r": 4, "lora_alpha": 16, "target_modules": ["query", "key"]},
        ],
        [0.7, -0.4],
    ),
    "GPT-2, turned": (
        "gpt2",
        [
            {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
            {"r": 4, "lora_alpha": 16, "target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True},
        ],
        [0.7, -0.4],
    ),
    "Mixtral, experts": ("mixtral", [{"r": 4, "lora_alpha": 8, **EXPERTS}, {"r": 2, "lora_alpha": 8, **EXPERTS}], [0.7, -0.4]),
}  # fmt: skip


class Images(torch.nn.Module):
    """A small convolutional model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.second = torch.nn.Conv2d(8, 6, 3, stride=2)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def outputs(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


def with_sum(base: Any, merged: list[dict[str, torch.Tensor]], weights: list[float]) -> Any:
    """The base with the weighted sum, in float64, of what PEFT's merges added to it."""
    state = base.state_dict()
    total = {
        name: (
            value.double()
            + sum(w * (m[name].double() - value.double()) for w, m in zip(weights, merged, strict=True))
        ).to(value)
        for name, value in state.items()
    }
    base.load_state_dict(total)
    return base


def in_peft(base: Any, adapter: Path) -> Any:
    """Load an adapter; no key of it may be missing or left over."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base, adapter)
    assert not [w for w in said if "missing" in str(w.message) or "unexpected" in str(w.message)]
    return loaded


def compare(
    root: Path,
    make: Callable[[], Any],
    options: list[dict[str, Any]],
    weights: list[float],
    inputs: torch.Tensor,
) -> None:
    made = [made_by_peft(make(), root / str(i), o, seed=i + 1) for i, o in enumerate(options)]
    expected = outputs(with_sum(make(), [m for _, m in made], weights), inputs)
    far = (expected - outputs(make(), inputs)).abs().max()
    assert far > 2e-3  # adapters that change nothing would show nothing
    for name, asked in (("cat", {"method": "cat"}), ("svd", {"rank": 1000})):
        combine([a for a, _ in made], root / name, weights=weights, **asked)
        found = outputs(in_peft(make(), root / name), inputs)
        assert (found - expected).abs().max() < 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_logits_of_the_weighted_sum(tmp_path, case):
    kind, options, weights = CASES[case]
    inputs = torch.arange(60).reshape(3, 20) * 7 % 40
    compare(tmp_path, lambda: tiny(kind), options, weights, inputs)


def test_peft_loads_experts_whose_parameters_need_unequal_ranks(tmp_path):
    """An energy gives each its own rank; the config can say one for a module, whose parameters it cannot tell apart."""
    options = [{"r": 8, "lora_alpha": 8, **EXPERTS}, {"r": 2, "lora_alpha": 8, **EXPERTS}]
    made = [made_by_peft(tiny("mixtral"), tmp_path / str(i), o, seed=i + 1) for i, o in enumerate(options)]
    result = combine([a for a, _ in made], tmp_path / "out", energy=0.9)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    of_experts = [m.rank for m in result.modules if "experts" in m.name]
    assert len(of_experts) == 4
    assert of_experts[0] == of_experts[1]
    assert (
        any("(down_proj|gate_up_proj)" in key for key in config["rank_pattern"])
        or config["r"] == of_experts[0]
    )
    ours = in_peft(tiny("mixtral"), tmp_path / "out").merge_and_unload().state_dict()
    base, expected = (
        tiny("mixtral").state_dict(),
        with_sum(tiny("mixtral"), [m for _, m in made], [1.0, 1.0]).state_dict(),
    )
    for name in (n for n in base if "experts" in n):
        assert (
            0 < (ours[name] - expected[name]).norm() < 0.33 * (expected[name] - base[name]).norm()
        )  # the root of 1 - 0.9


def test_peft_gives_the_outputs_of_convolutions(tmp_path):
    options = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second", "head"]},
        {"r": 2, "lora_alpha": 8, "target_modules": ["second"]},
    ]
    torch.manual_seed(0)
    compare(tmp_path, Images, options, [0.7, -4.0], 20 * torch.randn(2, 3, 12, 12))


def of_peft(adapters: list[Path], weights: list[float], kind: str, **more: Any) -> dict[str, torch.Tensor]:
    """What PEFT's own combination merges into the base."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny("llama"), adapters[0], adapter_name="0")
    model.load_adapter(adapters[1], adapter_name="1")
    model.add_weighted_adapter(["0", "1"], weights, "both", combination_type=kind, **more)
    model.set_adapter("both")
    return {n: v.double() for n, v in model.merge_and_unload().state_dict().items()}


NAMES = {
    "svd": {},
    "ties_svd": {"density": 0.4},
    "ties_svd, by number": {"density": 0.4, "majority_sign_method": "frequency"},
    "magnitude_prune_svd": {"density": 0.3},
    "linear": {},
    "ties": {"density": 0.4},
    "magnitude_prune": {"density": 0.3},
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_peft_mean_what_it_does_to_whole_matrices(tmp_path, name):
    """Where it works on them (``*_svd``) the results are equal; where it merges A and B by themselves they are far apart."""
    kind, options = name.split(",")[0], NAMES[name]
    made = [
        made_by_peft(
            tiny("llama"),
            tmp_path / str(i),
            {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
            seed=i,
        )[0]
        for i in (1, 2)
    ]
    is_whole = kind.endswith("svd")
    theirs = of_peft(made, [0.7, 0.4], kind, **options, **({"svd_rank": 32} if is_whole else {}))
    combine(made, tmp_path / "out", weights=[0.7, 0.4], method=kind, rank=32, **options)
    ours = in_peft(tiny("llama"), tmp_path / "out").merge_and_unload().state_dict()
    base = tiny("llama").state_dict()
    for tensor, value in theirs.items():
        change = (value - base[tensor].double()).norm()
        if change > 0:
            apart = (ours[tensor].double() - value).norm() / change
            assert apart < 1e-4 if is_whole else apart > 0.3, tensor


def test_the_config_targets_what_the_adapters_target(tmp_path):
    options = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]},
    ]
    made = [made_by_peft(tiny("llama"), tmp_path / str(i), o)[0] for i, o in enumerate(options)]
    combine(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
