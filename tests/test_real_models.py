"""Merges of real models load in transformers and work; what is measured of real models is what numpy finds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import alnico
import real
from alnico.cli.commands.demo import demo
from analysis.agreement import agree, same_scope
from analysis.reference import part, reference_analysis, scope
from made import family, read_model, save_model
from real import BASE, TUNED, installed

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers and torch
    pytest.mark.usefixtures("compiled"),
]


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    outcome = demo(folder)
    print(outcome.text())
    return folder


def embeddings(directory: Path, sentences: list[str]) -> np.ndarray:
    """Mean-pooled, normalised embeddings, as all-MiniLM-L6-v2's card defines them."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


@pytest.mark.slow
def test_the_merged_minilm_embeds_text(demonstrated: Path) -> None:
    sentences = [
        "The pod keeps crashing.",
        "The container restarts again and again.",
        "A recipe for apple pie.",
    ]
    for method in ("linear", "slerp", "task_arithmetic", "ties", "dare_linear"):
        crash, restart, pie = embeddings(demonstrated / method, sentences)
        assert crash @ restart > crash @ pie + 0.2, method


@pytest.mark.slow
def test_the_demo_leaves_whole_model_folders(demonstrated: Path) -> None:
    base = installed(*BASE)
    for folder in demonstrated.iterdir():
        names = {p.name for p in folder.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "modules.json", "1_Pooling"} <= names
        assert {"README.md", "mergekit_config.yml", "alnico.lock.json"} <= names
        merged, original = read_model(folder), read_model(base)
        assert set(merged) == set(original)
        assert np.array_equal(merged["embeddings.position_ids"], original["embeddings.position_ids"])


def test_the_page_shows_what_an_analysis_of_the_demos_models_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from alnico.cli.main import app

    shown = (
        (Path(__file__).parent.parent / "docs" / "analysis.md")
        .read_text("utf-8")
        .split("<!-- analysis -->")[1]
        .split("<!-- /analysis -->")[0]
    )
    monkeypatch.chdir(tmp_path)
    for name, place in (("all-MiniLM-L6-v2", BASE), ("sre-embedding", TUNED)):
        Path(name).symlink_to(installed(*place))
    app(["analyze", "--base", "all-MiniLM-L6-v2", "--models", "sre-embedding"], standalone_mode=False)
    assert capsys.readouterr().out.splitlines() == [
        line.removeprefix("    ") for line in shown.strip("\n").splitlines()
    ]


def test_the_page_shows_what_an_extraction_of_the_demos_models_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from alnico.cli.main import app

    shown = (
        (Path(__file__).parent.parent / "docs" / "lora.md")
        .read_text("utf-8")
        .split("<!-- lora -->")[1]
        .split("<!-- /lora -->")[0]
    )
    monkeypatch.chdir(tmp_path)
    for name, place in (("all-MiniLM-L6-v2", BASE), ("sre-embedding", TUNED)):
        Path(name).symlink_to(installed(*place))
    app(
        ["lora", "extract", "sre-embedding", "all-MiniLM-L6-v2", "sre-lora", "--rank", "32"],
        standalone_mode=False,
    )
    lines = [line.removeprefix("    ") for line in shown.strip("\n").splitlines()]
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines


@pytest.mark.slow
def test_the_midpoint_of_the_real_pair_is_the_mean(demonstrated: Path) -> None:
    base, tuned, merged = (
        read_model(installed(*BASE)),
        read_model(installed(*TUNED)),
        read_model(demonstrated / "linear"),
    )
    for name, values in tuned.items():
        assert np.array_equal(
            merged[name], ((base[name].astype(np.float64) + values) / 2).astype(np.float32)
        ), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "task_arithmetic"])
def test_a_merge_of_three_llamas_generates(method: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base, tuned = family(tmp_path, 3, shards=2, layers=3, hidden=32, vocabulary=64)
    recipe = {"merge_method": method, "models": [str(t) for t in tuned]} | (
        {} if method == "linear" else {"base_model": str(base)}
    )
    alnico.merge(recipe, tmp_path / "out", max_shard_size="20kB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    tokens = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > 3
    assert model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct in bf16 safetensors from its GGUF, and a short fine-tune of it."""
    import torch

    root = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = real.smollm2()

    def save(name: str) -> Path:
        model.to(torch.bfloat16).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        model.to(torch.float32)
        return root / name

    base = save("base")
    torch.manual_seed(0)
    text = "A magnet of alnico holds what iron, aluminium, nickel and cobalt each bring. " * 4
    batch = tokenizer(text, return_tensors="pt").input_ids
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(4):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return base, save("tuned")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("ties", marks=pytest.mark.slow),
        pytest.param("linear", marks=pytest.mark.nightly),
        pytest.param("slerp", marks=pytest.mark.nightly),
    ],
)
def test_a_merge_of_the_real_smollm2_answers(method: str, smollm2: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = smollm2
    recipe = {
        "linear": {"merge_method": "linear", "models": [str(base), str(tuned)]},
        "ties": {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [str(tuned)],
            "parameters": {"density": 0.5},
        },
        "slerp": {
            "merge_method": "slerp",
            "base_model": str(base),
            "models": [str(tuned)],
            "parameters": {"t": 0.3},
        },
    }[method]
    alnico.merge(recipe, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_real_pair_merged_in_memory_has_the_bits_of_the_files(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel

    base, tuned = (AutoModel.from_pretrained(installed(*place)) for place in (BASE, TUNED))
    recipe = {
        "merge_method": "dare_ties",
        "base_model": str(installed(*BASE)),
        "models": [str(installed(*TUNED))],
    }
    alnico.merge({**recipe, "parameters": {"density": 0.5}}, tmp_path / "out.safetensors")
    merged = alnico.merge_models([tuned], "dare_ties", base=base, density=0.5).state_dict()
    lazy = alnico.merge_models([tuned], "task_arithmetic", base=base, weights=[0.3])
    filled = (installed(*BASE) + 0.3 * alnico.TaskVector(installed(*TUNED), installed(*BASE))).apply(
        type(base)(base.config)
    )
    on_disk = read_model(tmp_path / "out.safetensors")
    compared = [name for name in on_disk if name in merged]
    assert len(compared) > 100
    assert all(merged[name].numpy().tobytes() == on_disk[name].tobytes() for name in compared)
    assert all(torch.equal(filled.state_dict()[name], value) for name, value in lazy.state_dict().items())


@pytest.mark.slow
def test_the_analysis_of_the_real_pair_is_that_of_numpy() -> None:
    base, tuned = installed(*BASE), installed(*TUNED)
    found = alnico.analyze([tuned], base=base)
    agree(found, reference_analysis(read_model(base), {str(tuned): read_model(tuned)}))
    (change,) = found.whole.changes
    assert change is not None
    assert change.relative_l2 == pytest.approx(0.01007, abs=5e-6)
    matrices = [t.changes[0] for t in found.tensors if t.name.startswith("encoder.") and len(t.shape) == 2]
    assert len(matrices) == 36
    assert np.mean([c.relative_l2 for c in matrices if c]) == pytest.approx(0.01374, abs=5e-6)


@pytest.mark.nightly  # each run analyses the small pair
def test_the_analysis_of_the_real_smollm2_is_that_of_numpy(
    smollm2: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = smollm2
    origin, one = read_model(base), read_model(tuned)
    random = np.random.default_rng(0)
    noise = {
        n: v + random.standard_normal(v.shape, np.float32) * np.float32(0.01) * np.abs(v)
        for n, v in origin.items()
    }
    other = save_model(tmp_path / "noise", {n: ("BF16", v) for n, v in noise.items()})
    two = read_model(other)
    found = alnico.analyze([tuned, other], base=base, threads=2)
    assert [t.name for t in found.tensors] == list(origin)
    assert max(v.size for v in origin.values()) > 2**24
    some = {t.layer for t in found.tensors if t.layer is None or t.layer % 10 == 0}
    for tensor in (t for t in found.tensors if t.layer in some):
        at, fitting = tensor.name, {0: one[tensor.name], 1: two[tensor.name]}
        same_scope(tensor, scope(at, [part(origin[at], fitting, found.top_share)], 2), 0.0)


@pytest.mark.slow
@pytest.mark.before_each_merge
def test_the_readme_shows_what_the_demo_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Except what differs from run to run: times and rates, and what a first run compiles."""
    from alnico.cli.main import app

    shown = (
        (Path(__file__).parent.parent / "README.md")
        .read_text("utf-8")
        .split("<!-- demo -->")[1]
        .split("<!-- /demo -->")[0]
    )
    monkeypatch.chdir(tmp_path)
    app(["demo"], standalone_mode=False)
    printed = capsys.readouterr().out
    lines = [line.removeprefix("    ") for line in shown.strip("\n").splitlines()]

    def steady(text: str) -> str:
        return re.sub(r" \+ [\d.]+ s compiling kernels \(.*\)|[\d.]+ s\b|\d\.\d\d$", "", text).replace(
            " ", ""
        )

    assert list(map(steady, lines)) == list(map(steady, printed.rstrip("\n").splitlines()))


@pytest.mark.slow
def test_the_demo_prints_its_result_as_json(demonstrated: Path) -> None:
    """The fixture's outcome, as ``alnico demo --json`` prints it."""
    import json

    data = json.loads(json.dumps(demo(demonstrated, offline=True).data()))
    assert {row["method"]: row["answers"]["first"] for row in data["rows"]}.keys() == {
        "linear",
        "slerp",
        "task_arithmetic",
        "ties",
        "dare_linear",
    }
    assert data["base_answers"] == {"first": 12, "mean_rank": 7.625, "questions": 40}
    assert data["tuned_answers"] == {"first": 8, "mean_rank": 10.625, "questions": 40}
    assert data["chance_rank"] == 20.5
    assert data["seconds"] > data["merge_seconds"] > 0
