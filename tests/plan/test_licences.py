"""Licences are read from the models' cards, conflicts named; where it is asked for, refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.lineage import Lineage
from alnico.errors import MismatchError
from alnico.plan.licences import KINDS, LICENCES, licence_conflicts, model_licences
from made import family, save_file

Run = Callable[..., tuple[int, str, str]]
PAIR = {"merge_method": "linear", "models": ["tuned-0", "tuned-1"]}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 3, layers=1)


def state(model: str, **front: Any) -> None:
    (Path(model) / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# A model\n")


def said_of(*licences: dict[str, str]) -> list[str]:
    return [
        line.removeprefix("licences: ") for line in licence_conflicts(model_licences(_lineages(*licences)))
    ]


def _lineages(*licences: dict[str, str]) -> list[Lineage]:
    return [Lineage("abcd"[i], licence) for i, licence in enumerate(licences)]


REFUSED = (
    "--strict-license (strict_license=True) refuses licences that conflict, are not stated or are not known. Leave a model "
    "out, or merge without it. This is not legal advice."
)
OWN = "which has terms of its own that also bind models made from it"
NC = "which forbids commercial use, also of models made from it"


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ([{"license": "mit"}, {"license": "apache-2.0"}], []),
        ([{"license": "gemma"}, {"license": "gemma"}], []),
        ([{"license": "cc-by-nc-4.0"}, {"license": "cc-by-nc-4.0"}], []),
        ([{"license": "gpl-3.0"}, {"license": "gpl-3.0"}], []),
        ([{}, {}], []),
        ([{"license": "mit"}, {}], []),
        ([{"license": "cc-by-nc-4.0"}, {}], []),
        ([{"license": "mit"}, {}, {"license": "other", "license_name": "my-own"}], []),
        ([{"license": "other"}, {"license": "other"}], []),
        ([{"license": "cc-by-nc-4.0"}, {"license": "mit"}], [f"a is cc-by-nc-4.0, {NC}; b is mit."]),
        ([{"license": "cc-by-nc-4.0"}, {"license": "mit"}, {}, {"license": "mit"}], [f"a is cc-by-nc-4.0, {NC}; b and d are mit."]),
        ([{"license": "gemma"}, {"license": "mit"}], [f"a is gemma, {OWN}; b is mit."]),
        ([{"license": "llama3.1"}, {"license": "gemma"}], [f"a is llama3.1 and b is gemma, each of {OWN}."]),
        ([{"license": "other", "license_name": "llama3"}, {"license": "Apache-2.0"}], [f"a is llama3, {OWN}; b is Apache-2.0."]),
        (
            [{"license": "mit"}, {"license": "agpl-3.0"}],
            ["b is agpl-3.0, which requires models made from it to be shared under the same licence; a is mit."],
        ),
        (
            [{"license": "cc-by-nd-4.0"}, {"license": "cc-by-nd-4.0"}],
            ["a and b are cc-by-nd-4.0, which forbids sharing changed versions, and a merge is one."],
        ),
    ],
)  # fmt: skip
def test_licences_that_do_not_go_together_are_named_with_the_reason(
    licences: list[dict[str, str]], expected: list[str]
) -> None:
    assert said_of(*licences) == expected


def test_the_table_is_in_lower_case_and_of_kinds_that_have_a_reason() -> None:
    assert all(name == name.lower() for name in LICENCES)
    assert set(LICENCES.values()) == set(KINDS)


def test_a_conflict_is_a_note_of_plan_merge_and_card(run: Run) -> None:
    state("tuned-0", license="cc-by-nc-4.0")
    state("tuned-1", license="mit")
    line = f"licences: tuned-0 is cc-by-nc-4.0, {NC}; tuned-1 is mit."
    assert alnico.plan(PAIR).notes == (line,)
    Path("r.yml").write_text(yaml.safe_dump(PAIR))
    code, _, stderr = run("merge", "r.yml", "out")
    assert (code, stderr) == (0, f"note: {line}\n")
    card = Path("out/README.md").read_text()
    assert f"\n- {line}\n\nThis is not legal advice.\n" in card
    assert "license:" not in card


@pytest.mark.parametrize("option", ["--strict-license"])
def test_a_conflict_is_an_error_where_that_is_asked_for_before_a_tensor_is_read(
    option: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    state("tuned-0", license="gemma")
    state("tuned-1", license="mit")
    Path("r.yml").write_text(yaml.safe_dump(PAIR))

    def read_into(*of_what: object) -> None:
        raise AssertionError(of_what)

    monkeypatch.setattr(FileModel, "read_into", read_into)
    for command in (
        ("merge", "r.yml", "out", option),
        ("plan", "r.yml", option),
        ("merge", "r.yml", "out", option, "--dry-run"),
    ):
        assert run(*command) == (
            5,
            "",
            f"alnico: licences: tuned-0 is gemma, {OWN}; tuned-1 is mit.\n{REFUSED}\n",
        )
    assert not Path("out").exists()


def test_strict_refuses_also_licences_that_nobody_states() -> None:
    (Path("tuned-1") / "LICENSE.txt").write_text("own")
    with pytest.raises(MismatchError) as caught:
        alnico.merge(PAIR, "out", strict_license=True)
    assert str(caught.value).splitlines() == [
        "licences: no licence is stated by tuned-0 and tuned-1 (it has a licence file, but no card that names it).",
        REFUSED,
    ]
    state("tuned-0", license="other", license_name="my-own")
    state("tuned-1", license="mit")
    assert alnico.plan(PAIR).notes == ()
    with pytest.raises(MismatchError) as caught:
        alnico.plan(PAIR, strict_license=True)
    assert str(caught.value).splitlines() == [
        "licences: alnico does not know the terms of tuned-0 (my-own).",
        REFUSED,
    ]
    for model in ("tuned-0", "tuned-1"):
        state(model, license="mit")
    assert alnico.merge(PAIR, "out", strict_license=True).digests
    assert yaml.safe_load(Path("out/README.md").read_text().split("---")[1])["license"] == "mit"


def test_the_licences_of_a_merges_own_inputs_count_also_when_they_are_gone() -> None:
    state("tuned-0", license="llama3")
    state("tuned-1", license="llama3")
    state("tuned-2", license="mit")
    alnico.merge(PAIR, "first")
    for model in ("tuned-0", "tuned-1"):
        (Path(model) / "README.md").unlink()
    (Path("first") / "README.md").unlink()
    notes = alnico.plan({"merge_method": "linear", "models": ["first", "tuned-2"]}).notes
    assert notes == (f"licences: tuned-0 and tuned-1 are llama3, {OWN}; tuned-2 is mit.",)


def test_the_licences_of_stages_are_those_of_what_they_are_made_of() -> None:
    state("tuned-0", license="cc-by-nc-4.0")
    state("tuned-1", license="cc-by-nc-4.0")
    state("tuned-2", license="mit")
    text = "name: first\nmerge_method: linear\nmodels: [tuned-0, tuned-1]\n---\nmerge_method: linear\nmodels: [first, tuned-2]\n"
    plans = alnico.plan_documents(text)
    assert plans[0].notes == ()
    (note,) = plans[1].notes
    assert note == f"licences: tuned-0 and tuned-1 are cc-by-nc-4.0, {NC}; tuned-2 is mit."
    with pytest.raises(MismatchError):
        alnico.merge_documents(text, "out", strict_license=True)
    assert not Path("out").exists()
    (result,) = alnico.merge_documents(text, "out")
    assert note in result.plan.notes
    assert f"- {note}" in Path("out/README.md").read_text()


def test_a_card_is_read_once_for_many_plans_and_anew_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    state("tuned-0", license="gemma")
    state("tuned-1", license="mit")
    assert len(alnico.plan(PAIR).notes) == 1
    with monkeypatch.context() as patch:
        patch.setattr(yaml, "safe_load", lambda *_: {})
        assert len(alnico.plan(PAIR).notes) == 1
    state("tuned-0", license="apache-2.0")
    assert alnico.plan(PAIR).notes == ()


def test_an_adapter_has_a_licence_of_its_own() -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{key}.lora_A.weight": ("F32", np.ones((1, 16))),
        f"{key}.lora_B.weight": ("F32", np.ones((16, 1))),
    }
    save_file(Path("adapter/adapter_model.safetensors"), factors)
    Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    state("base", license="apache-2.0")
    state("adapter", license="cc-by-nc-4.0")
    (note,) = alnico.plan({"merge_method": "linear", "models": ["base+adapter"]}).notes
    assert note == f"licences: adapter is cc-by-nc-4.0, {NC}; base is apache-2.0."


def test_card_and_lock_carry_the_lineage_of_the_inputs() -> None:
    state("tuned-0", license="mit", base_model="org/base")
    state("tuned-1", license="mit", base_model=["org/base", "org/other"])
    alnico.merge(PAIR, "first")
    alnico.merge({"merge_method": "linear", "models": ["first", "tuned-2"], "unrelated": "allow"}, "second")
    card = Path("second/README.md").read_text()
    assert (
        "## Lineage\n\nAs the parents' own cards and locks say:\n\n- first: a merge of tuned-0, tuned-1\n"
        "  - tuned-0: made from org/base\n  - tuned-1: made from org/base, org/other\n"
    ) in card
    assert yaml.safe_load(Path("first/README.md").read_text().split("---")[1])["license"] == "mit"
    inputs = json.loads(Path("second/alnico.lock.json").read_text())["inputs"]
    assert inputs[0]["merge_of"] == [
        {"name": "tuned-0", "licence": {"license": "mit"}, "base_model": ["org/base"]},
        {"name": "tuned-1", "licence": {"license": "mit"}, "base_model": ["org/base", "org/other"]},
    ]
    assert "merge_of" not in inputs[1]
    alnico.merge({"merge_method": "linear", "models": ["second", "tuned-2"], "unrelated": "allow"}, "third")
    third = Path("third/README.md").read_text()
    assert (
        "- second: a merge of first, tuned-2\n  - first: a merge of tuned-0, tuned-1\n    - tuned-0: made from org/base\n"
        in third
    )


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [mit]\nbase_model: {a: b}\n---\n",
        b"---\nlicense: 'a | b'\nbase_model: ['| x |', 3]\n---\n",
        b"---\n- 1\n---\n",
        b"---\nlicense: mit\n",  # no end
        b"---\n: : :\n---\n",
        b"---\n" + b"[" * 5_000 + b"\n---\n",
        b"---\nlicense: mit\n" + b"a: 1\n" * 50_000 + b"---\n",
        b"\xff\xfe\x00",
        b"",
    ],
)
def test_a_card_that_says_nothing_readable_states_no_licence(card: bytes) -> None:
    (Path("tuned-0") / "README.md").write_bytes(card)
    state("tuned-1", license="mit")
    assert alnico.plan(PAIR).notes == ()
    with pytest.raises(MismatchError, match="no licence is stated by tuned-0"):
        alnico.plan(PAIR, strict_license=True)


@pytest.mark.parametrize(
    "inputs",
    [
        "3",
        "[3, null, {}]",
        '[{"model": 3, "licence": [], "merge_of": 3}]',
        '[{"model": "x", "tensors": {}, "lock": {"inputs": [{"model": "x", "lock": 3}]}}]',
        '[{"model": "a | b", "merge_of": [{"name": "| c |"}, 3]}]',
    ],
)
def test_a_lock_of_whatever_kind_stops_no_merge_and_names_no_stranger_in_the_card(inputs: str) -> None:
    (Path("tuned-0") / "alnico.lock.json").write_text(f'{{"inputs": {inputs}}}')
    alnico.merge(PAIR, "out")
    assert "| c |" not in Path("out/README.md").read_text()


def test_merges_inside_merges_are_followed_to_a_depth() -> None:
    inner: dict[str, Any] = {"inputs": []}
    for _ in range(200):
        inner = {"inputs": [{"model": "m", "tensors": {}, "lock": inner}]}
    (Path("tuned-0") / "alnico.lock.json").write_text(json.dumps(inner))
    alnico.merge(PAIR, "out")
    assert len(Path("out/README.md").read_text()) < 10_000


def test_the_fold_of_an_extracted_adapter_has_the_licence_of_what_it_is_made_of() -> None:
    for model in ("base", "tuned-0", "tuned-1"):
        state(model, license="apache-2.0")
    for i in (0, 1):
        alnico.lora.extract(f"tuned-{i}", "base", f"adapter-{i}", rank=1)
    alnico.lora.combine(["adapter-0", "adapter-1"], "combined", saved="average")
    for adapter in ("adapter-0", "combined"):
        out = Path(f"folded-{adapter}")
        assert alnico.lora.fold("base", adapter, out).plan.notes == ()
        text = (out / "README.md").read_text()
        assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
        assert f"| base+{adapter} | not from the hub | merged; config, tokenizer | apache-2.0 |" in text
        assert "no licence" not in text
        alnico.plan({"merge_method": "linear", "models": [f"base+{adapter}"]}, strict_license=True)


def test_an_extracted_adapter_keeps_the_licences_of_its_models_when_they_conflict() -> None:
    state("base", license="apache-2.0")
    state("tuned-0", license="cc-by-nc-4.0")
    alnico.lora.extract("tuned-0", "base", "adapter", rank=1)
    for model in ("base", "tuned-0"):
        (Path(model) / "README.md").unlink()
    (note,) = alnico.plan({"merge_method": "linear", "models": ["base+adapter"]}).notes
    assert note == f"licences: tuned-0 is cc-by-nc-4.0, {NC}; base is apache-2.0."


def test_models_without_cards_are_merged_without_a_word_about_licences(run: Run) -> None:
    state("tuned-1", license="mit")
    for number, models in enumerate((["base", "tuned-0"], ["tuned-0", "tuned-1"])):
        Path("r.yml").write_text(yaml.safe_dump({**PAIR, "models": models}))
        code, _, stderr = run("merge", "r.yml", f"out-{number}")
        assert (code, stderr) == (0, "")
        assert "The parents do not all state one licence" in Path(f"out-{number}/README.md").read_text()
