"""The page on moving over from mergekit lists every flag of mergekit-yaml 0.1.5, and what it says of them is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from alnico.devices import Device, made_gpus
from how_to.page_blocks import ROOT
from made import family

PAGE = (ROOT / "docs" / "how-to" / "from-mergekit.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in PAGE.partition("<!-- flags -->")[2].partition("<!-- /flags -->")[0].strip().split("\n")[2:]
]
SWITCHES = (
    "allow-crimes", "async-write", "clone-tensors", "copy-tokenizer", "cuda", "gpu-rich", "lazy-unpickle", "low-cpu-memory",
    "multi-gpu", "quiet", "read-to-gpu", "safe-serialization", "trust-remote-code", "unsafe-truncate-embeddings", "verbose",
    "write-model-card",
)  # fmt: skip
VALUES = {
    "device": "cuda", "lora-merge-cache": "cache", "lora-merge-dtype": "float16", "num-threads": "2", "out-shard-size": "5B",
    "random-seed": "3", "transformers-cache": "cache", "write-threads": "2",
}  # fmt: skip
"""The options of MergeOptions in mergekit 0.1.5, and values for those that take one."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 1)
    (tmp_path / "r.yml").write_text("merge_method: linear\nmodels: [base, tuned-0]\n")
    return "r.yml"


def test_the_page_lists_every_flag_of_mergekit() -> None:
    listed = [re.findall(r"`--([\w-]+)`", row[0]) for row in ROWS]
    assert sorted(name for (name,) in listed) == sorted([*SWITCHES, *VALUES])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_flag_of_mergekit_does_what_the_page_says(
    row: list[str], recipe: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    (name,) = re.findall(r"`--([\w-]+)`", row[0])
    words = [f"--{name}", *([VALUES[name]] if name in VALUES else [])]
    with made_gpus([Device("cuda:0", "Made", 8 << 30)]):
        code, _, printed = run("merge", recipe, "out", "--dry-run", *words)
    if row[1].startswith("refused"):
        assert code == 2
        assert f"--{name}: " in printed
    elif row[1] == "no effect":
        assert code == 0
        assert f"note: --{name} has no effect: " in printed
    else:
        assert row[1] == "works"
        assert (code, "no effect" in printed) == (0, False)


def test_every_command_of_mergekit_is_on_the_page() -> None:
    commands = {
        "yaml",
        "multi",
        "pytorch",
        "moe",
        "evolve",
        "extract-lora",
        "tokensurgeon",
        "layershuffle",
        "legacy",
    }
    assert {f"mergekit-{name}" for name in commands} | {"bakllama"} <= set(re.findall(r"[\w-]+", PAGE))


OTHERS = {
    "mergekit-multi": "out-path intermediate-dir lazy",
    "mergekit-pytorch": "tensor-intersection tensor-union",
    "mergekit-extract-lora": "model base-model out-path max-rank distribute-scale embed-lora save-module exclude-regex include-regex sv-epsilon "
    "skip-undecomposable",
    "mergekit-legacy": "merge density weight method base-model normalize int8-mask bf16 naive-count print-yaml",
    "mergekit-evolve": "max-fevals vllm strategy in-memory storage-path num-gpus merge-cuda random-seed batch-size sigma0 wandb wandb-project "
    "wandb-entity task-search-path i-understand-the-depths-of-the-evils-i-am-unleashing save-final-model reshard timeout load-in-8bit load-in-4bit "
    "force-population-size",
    "mergekit-layershuffle": "model weight print-yaml write-yaml dry-run fp16 full-random",
    "bakllama": "clone-tensors fp16",
    "mergekit-moe": "load-in-4bit load-in-8bit i-understand-this-is-not-useful-without-training",
    "fill_missing_params": "max_shard_size output_dir",
    "mergekit-tokensurgeon": "k approximation-method subword-method byte-match batch-size cosine-similarity weight-scheme prefix-match magikarp "
    "new-vocab-noise new-vocab-scale",
}  # fmt: skip
"""The options that the other commands of mergekit 0.1.5 add to those of mergekit-yaml."""


def test_the_page_lists_the_flags_of_the_other_commands() -> None:
    listed: dict[str, list[str]] = {}
    command = ""
    for line in (
        PAGE.partition("<!-- other flags -->")[2]
        .partition("<!-- /other flags -->")[0]
        .strip()
        .split("\n")[2:]
    ):
        name, flags, _ = (cell.strip() for cell in line.strip().strip("|").split(" | "))
        command = name.strip("` ") or command
        listed.setdefault(command, []).extend(re.findall(r"`--([\w-]+)`", flags))
    assert {name: sorted(flags) for name, flags in listed.items()} == {
        name: sorted(flags.split()) for name, flags in OTHERS.items()
    }
