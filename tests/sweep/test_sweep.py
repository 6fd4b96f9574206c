"""The sweep over some architectures of all kinds, held against the page of the whole; and the whole, nightly."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweep.run_sweep import WHOLE, Table, by_check, chosen, page, refused_on, run

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
FEW = ("LlamaForCausalLM",)
SOME = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "MambaForCausalLM",
    "RecurrentGemmaForCausalLM",
    "NemotronHForCausalLM",
    "Gemma3nForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "ModernBertForMaskedLM",
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "LlamaForSequenceClassification",
    "ViTForImageClassification",
    "ResNetForImageClassification",
    "Qwen2VLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "CLIPModel",
    "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC",
    "DPTForDepthEstimation",
)


def wrong(table: Table) -> list[str]:
    return [f"{n} {c}: {d}" for n, e in table.items() for c, (w, d) in e["outcomes"].items() if w == "wrong"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [pytest.param(FEW, marks=pytest.mark.before_each_merge, id="few"), pytest.param(SOME, id="some")]
)
def test_no_architecture_of_some_is_merged_wrongly_and_the_page_lists_what_is_refused(
    names: tuple[str, ...],
) -> None:
    table = run(chosen([], list(names)), [], processes=min(len(names), 2))
    assert not wrong(table)
    refused = {(c, n) for n, e in table.items() for c, (w, _) in e["outcomes"].items() if w == "refused"}
    assert refused == {(c, n) for c, n in refused_on(PAGE.read_text("utf-8")) if n in names}
    # Each check has results, so that none is left out unseen.
    assert names == FEW or all(counted["equal"] for counted in by_check(table).values())


@pytest.mark.nightly
def test_no_architecture_is_merged_wrongly_and_the_page_lists_what_is_refused(tmp_path: Path) -> None:
    table = run(chosen([], []), [], processes=2, out=tmp_path / "table.json")
    assert not wrong(table)
    refused = {(c, n) for n, e in table.items() for c, (w, _) in e["outcomes"].items() if w == "refused"}
    assert refused == refused_on(PAGE.read_text("utf-8"))
    assert {entry["kind"] for entry in table.values()} >= set(WHOLE)


def test_a_page_lists_each_refusal_and_counts_by_check() -> None:
    folder = "/tmp/sweep-abc/"
    table: Table = {
        "OneForCausalLM": {"kind": "causal_lm", "outcomes": {"average": ["equal", ""], "stack": ["refused", f"{folder}deep/a has it | {folder}b lacks it / x"]}},
        "TwoForCausalLM": {"kind": "causal_lm", "outcomes": {"average": ["wrong", "w is off"], "stack": ["untested", "no list"]}},
    }  # fmt: skip
    written = page(table, {"average": {"equal": 2}})
    assert refused_on(written) == {("stack", "OneForCausalLM")}
    assert "| stack | OneForCausalLM | a has it \\| b lacks it |" in written
    assert "| average | TwoForCausalLM | w is off |" in written
    assert [line[line.index(" | ") :] for line in written.splitlines() if line.startswith("| average: ")] == [
        " | 1 | 0 | 1 | 0 | 2 | 0 | 0 |"
    ]
    assert "| causal lm | 2 | 1 / 0 / 1 |" in written
    assert wrong(table) == ["TwoForCausalLM average: w is off"]
