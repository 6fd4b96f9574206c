"""Make ``adapters.safetensors``: small bases, adapters of PEFT, and what PEFT merges them to, in float64.

Run with peft 0.21 and torch in the environment: ``python tests/checkpoint/peft/make_adapters.py``.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parent


class Net(nn.Module):
    """One layer of every kind that LoRA changes, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.square = nn.Linear(5, 5)
        self.wide = nn.Linear(5, 9, bias=False)
        self.turned = Conv1D(6, 9)
        self.stored = Conv1D(5, 5)
        self.conv = nn.Conv2d(3, 4, 3)
        self.point = nn.Conv2d(4, 3, 1)
        self.line = nn.Conv1d(3, 2, 3)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)


CASES = {
    "plain": {"r": 2, "lora_alpha": 3, "target_modules": ["square", "wide"]},
    "rslora": {"r": 3, "lora_alpha": 2, "use_rslora": True, "target_modules": ["wide"]},
    "patterns": {
        "r": 2, "lora_alpha": 4, "target_modules": ["square", "wide", "conv"], "rank_pattern": {"wide": 3, "^conv": 1},
        "alpha_pattern": {"square": 16},
    },
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["square", "wide", "embed", "conv", "point", "line"]},
    "dora-turned": {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["turned", "stored"], "fan_in_fan_out": True},
    "turned": {"r": 2, "lora_alpha": 4, "target_modules": ["turned", "stored"], "fan_in_fan_out": True},
    "layers": {"r": 2, "lora_alpha": 4, "target_modules": ["embed", "conv", "point", "line"]},
    "saved": {"r": 2, "target_modules": ["wide"], "modules_to_save": ["head", "norm"]},
    "biases": {"r": 2, "target_modules": ["square"], "bias": "all"},
    "lora-biases": {"r": 2, "target_modules": ["square"], "bias": "lora_only"},
    "lora-bias": {"r": 2, "lora_alpha": 6, "target_modules": ["square"], "lora_bias": True},
}  # fmt: skip


def main() -> None:
    from peft import LoraConfig, get_peft_model  # in an environment of its own, not in that of the suite

    found: dict[str, torch.Tensor] = {}
    configs = {}
    for seed, (case, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        net = Net().double()
        found |= {f"{case}/base/{name}": value.clone() for name, value in net.state_dict().items()}
        model = get_peft_model(net, LoraConfig(init_lora_weights=False, **options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            configs[case] = json.loads((Path(folder) / "adapter_config.json").read_text())
            found |= {
                f"{case}/adapter/{name}": value
                for name, value in load_file(Path(folder) / "adapter_model.safetensors").items()
            }
        merged = model.merge_and_unload().state_dict()
        changed = {n: v for n, v in merged.items() if not torch.equal(v, found[f"{case}/base/{n}"])}
        found |= {f"{case}/merged/{name}": value for name, value in changed.items()}
    kept = {"adapter", "merged"}
    used = {
        f"{c}/base/{n}"
        for c in CASES
        for n in (k.split("/")[2] for k in found if k.startswith(f"{c}/merged/"))
    }
    tensors = {n: v.contiguous() for n, v in found.items() if n.split("/")[1] in kept or n in used}
    save_file(tensors, HERE / "adapters.safetensors", {"configs": json.dumps(configs)})


if __name__ == "__main__":
    main()
