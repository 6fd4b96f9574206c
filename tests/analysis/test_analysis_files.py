"""What ``alnico analyze`` prints and leaves on disk."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import alnico
from alnico.analysis.common_tensors import names_of, short_names
from alnico.analysis.results import DeltaStatistics, Pair, ScopeStatistics, Skipped, Subspace, TensorScope
from alnico.checkpoint.memory_model import MemoryModel
from alnico.errors import AlnicoError, MismatchError, ModelError, NonFiniteError, OutputError, ResourceError

DOCUMENT = Path(__file__).parents[2] / "docs" / "analysis.md"
NAMES = {
    "model.embed_tokens.weight": (40, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
}


def models(folder: Path, count: int = 2) -> tuple[Path, list[Path]]:
    """A base and fine-tunes of it, as files."""
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in NAMES.items()}
    places = [folder / name for name in ["base", *(f"tuned-{i}" for i in range(count))]]
    for i, place in enumerate(places):
        place.mkdir()
        tuned = {n: v + np.float32(rng.normal(0, 0.01 * i, v.shape)) for n, v in base.items()}
        save_file(tuned, place / "model.safetensors")
    return places[0], places[1:]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_is_written_is_what_was_found(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    found = alnico.analyze(tuned, base=base, out=tmp_path / "report", threads=1)
    assert alnico.read_analysis(tmp_path / "report") == found
    assert alnico.read_analysis(tmp_path / "report" / "summary.json") == found


def test_one_model_may_stand_by_itself(tmp_path: Path) -> None:
    base, (tuned,) = models(tmp_path, 1)
    assert alnico.analyze(str(tuned), base=base).models == alnico.analyze([tuned], base=base).models


def test_a_model_has_its_tables_and_its_summary(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    alnico.analyze(tuned, base=base, out=tmp_path / "report", threads=1)
    own = tmp_path / "report" / "tuned-1"
    deltas = _deltas(base, tuned[1])
    table = {row["tensor"]: row for row in rows(own / "per_param_stats.csv")}
    assert set(table) == set(NAMES)
    for name, delta in deltas.items():
        assert float(table[name]["l2"]) == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert float(table[name]["q50"]) == pytest.approx(np.median(delta), rel=1e-12)
    norms = [float(row["l2"]) for row in rows(own / "top50_by_l2.csv")]
    largest = [float(row["max_abs"]) for row in rows(own / "top50_by_maxabs.csv")]
    assert norms == sorted(norms, reverse=True)
    assert largest == sorted(largest, reverse=True)
    summary = json.loads((own / "summary.json").read_text())
    every = np.concatenate([d.reshape(-1) for d in deltas.values()])
    assert summary["global_l2"] == pytest.approx(np.linalg.norm(every), rel=1e-12)
    assert summary["global_l1"] == pytest.approx(np.abs(every).sum(), rel=1e-12)
    assert summary["n_params_considered"] == every.size
    assert summary["skipped_params"] == []
    assert set(summary["groups"]) == {"embedding", "attention", "mlp", "norm"}
    assert set(summary["layers"]) == {"0", "1"}


def _deltas(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    with alnico.open_model(base) as one, alnico.open_model(tuned) as other:
        return {name: (other.read(name) - one.read(name)).astype(np.float64) for name in NAMES}


def test_the_page_and_the_pictures_lie_beside_the_numbers(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    alnico.analyze(tuned, base=base, out=tmp_path / "report", threads=1)
    assert "tuned-1" in (tmp_path / "report" / "report.html").read_text()
    assert 'id="map"' in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name in ("tuned-0", "tuned-1"):
        assert (tmp_path / "report" / name / "group_l2_bar.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_numbers_do_not_need_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.cli.main import app
    from alnico.installation import install_hint

    base, (tuned,) = models(tmp_path, 1)
    for room in ("page", "report"):
        monkeypatch.setattr(f"alnico.analysis.{room}.has_report", lambda: False)
    app(
        ["analyze", str(tuned), "--base", str(base), "-j", "1", "--out", str(tmp_path / "report")],
        standalone_mode=False,
    )
    assert f"without the page and pictures. {install_hint('report')}\n" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "summary.json",
        "pairwise_cosines.csv",
        "tuned-0",
    }


def test_the_pairs_table_has_a_row_for_each_scope_and_pair(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, 3)
    found = alnico.analyze(tuned, base=base, out=tmp_path / "report", threads=1)
    table = rows(tmp_path / "report" / "pairwise_cosines.csv")
    assert [(r["scope"], r["model"], r["other"]) for r in table[:3]] == [
        ("whole", "tuned-0", "tuned-1"),
        ("whole", "tuned-0", "tuned-2"),
        ("whole", "tuned-1", "tuned-2"),
    ]
    assert len(table) == 3 * (1 + 4 + 2)
    assert float(table[2]["cosine"]) == found.whole.pairs[2].cosine


def test_an_analysis_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    alnico.analyze(tuned[:1], base=base, out=tmp_path / "report", threads=1)
    alnico.analyze(tuned[1:], base=base, out=tmp_path / "report", threads=1)
    assert [m.name for m in alnico.read_analysis(tmp_path / "report").models] == ["tuned-1"]
    with pytest.raises(OutputError, match="contains files that are not from an analysis"):
        alnico.analyze(tuned, base=base, out=base, threads=1)
    assert (base / "model.safetensors").exists()


def test_a_folder_with_other_things_is_refused_before_models_are_read(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="Choose a new folder, or empty it"):
        alnico.analyze([tmp_path / "no"], base=tmp_path / "none", out=tmp_path / "precious")


def test_a_summary_of_something_else_makes_no_folder_of_reports(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    (tmp_path / "summary.json").write_text('{"loss": 1}')
    with pytest.raises(OutputError, match="contains files that are not from an analysis"):
        alnico.analyze(tuned, base=base, out=tmp_path, threads=1)
    assert all((model / "model.safetensors").is_file() for model in tuned)


def test_a_model_in_the_folder_of_reports_is_left_alone(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    report = tmp_path / "report"
    alnico.analyze(tuned[:1], base=base, out=report, threads=1)
    tuned[1].rename(report / "tuned-1")
    with pytest.raises(OutputError) as caught:
        alnico.analyze([report / "tuned-1"], base=base, out=report, threads=1)
    assert str(caught.value) == (
        f"{report / 'tuned-1'}: contains files that are not from an analysis; the tables of tuned-1 go there. Choose a new folder."
    )
    assert [p.name for p in (report / "tuned-1").iterdir()] == ["model.safetensors"]
    assert alnico.read_analysis(report).models[0].name == "tuned-0"


def test_nothing_is_left_of_an_older_analysis(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    report = tmp_path / "report"
    alnico.analyze(tuned, base=base, out=report, threads=1)
    (report / "retention.json").write_text("{}")
    (report / "tuned-0" / "notes.txt").write_text("mine")
    alnico.analyze(tuned[1:], base=base, out=report, threads=1)
    assert [p.name for p in (report / "tuned-0").iterdir()] == ["notes.txt"]
    assert not (report / "retention.json").exists()


def test_every_key_of_the_summary_is_documented() -> None:
    text = DOCUMENT.read_text()
    keys = {
        field.name
        for kind in (DeltaStatistics, Pair, ScopeStatistics, Skipped, Subspace, TensorScope)
        for field in dataclasses.fields(kind)
    }
    assert sorted(key for key in keys if f"`{key}`" not in text) == []


def test_models_have_short_names_of_their_own() -> None:
    labels = [
        "org/coder@main",
        "./a/model.safetensors",
        "b/model.safetensors",
        "base+x/my adapter",
        "c/CODER-main",
        "/",
    ]
    found = names_of([MemoryModel(label, {}) for label in labels])
    assert found == ["coder-main", "a", "b", "my-adapter", "CODER-main-2", "model"]


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    base, (tuned,) = models(tmp_path, 1)
    with alnico.open_model(tuned) as model:
        tensors = {name: model.read(name) for name in NAMES}
    tensors["model.embed_tokens.weight"] = np.zeros((41, 8), np.float32)
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, tuned / "model.safetensors")
    found = alnico.analyze([tuned], base=base, threads=1)
    assert {(s.tensor, s.reason) for s in found.skipped} == {
        ("model.embed_tokens.weight", "its shape is (41, 8), in the base (40, 8)"),
        ("model.norm.weight", "the model has no such tensor"),
        ("extra", "the base has no such tensor"),
    }
    assert {t.name for t in found.tensors} == {n for n in NAMES if "layers" in n}


def test_mistakes_are_told(tmp_path: Path) -> None:
    base, (tuned,) = models(tmp_path, 1)
    with pytest.raises(AlnicoError, match=r"share of top parameters is 20; expected a number in \(0, 1\]"):
        alnico.analyze([tuned], base=base, top_share=20)
    with pytest.raises(ResourceError, match="Raise --memory to"):
        alnico.analyze([tuned], base=base, memory="100MiB")
    with pytest.raises(AlnicoError, match="at least one model"):
        alnico.analyze([], base=base)
    save_file({"other": np.zeros(3, np.float32)}, tuned / "model.safetensors")
    with pytest.raises(MismatchError, match=r"share no float tensor \(name and shape\)"):
        alnico.analyze([tuned], base=base)


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    base, (tuned,) = models(tmp_path, 1)
    with alnico.open_model(tuned) as model:
        tensors = {name: model.read(name) for name in NAMES}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, tuned / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"mlp\.up_proj\.weight\[3, 5\]: .*tuned-0 has NaN"):
        alnico.analyze([tuned], base=base)


def test_an_analysis_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"schema": 7}')
    with pytest.raises(ModelError, match="not an analysis of schema 1"):
        alnico.read_analysis(tmp_path)
    (tmp_path / "summary.json").write_text('{"schema": 1}')
    with pytest.raises(ModelError, match="is damaged"):
        alnico.read_analysis(tmp_path)


@pytest.mark.parametrize("words", [["--models", "A", "B"], ["A", "B"], ["--models=A", "--models", "B"]])
def test_models_stand_where_hands_put_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    from alnico.cli.main import app

    base, tuned = models(tmp_path)
    given = [word.replace("A", str(tuned[0])).replace("B", str(tuned[1])) for word in words]
    app(["analyze", *given, "--base", str(base), "--threads", "1", "--json"], standalone_mode=False)
    data = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in data["models"]] == ["tuned-0", "tuned-1"]


def test_the_tables_say_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from alnico.cli.main import app

    base, tuned = models(tmp_path)
    app(["analyze", *map(str, tuned), "--base", str(base), "--threads", "1", "-v"], standalone_mode=False)
    text = capsys.readouterr().out
    deltas = _deltas(base, tuned[1])
    size = math.sqrt(sum(float((d**2).sum()) for d in deltas.values()))
    with alnico.open_model(base) as model:
        of_base = math.sqrt(sum(float((model.read(n).astype(np.float64) ** 2).sum()) for n in NAMES))
    assert f"{size:.4g}" in text
    assert f"{size / of_base:.2%}" in text
    for word in ("embedding", "attention", "mlp", "norm", "layer 1", "tuned-0 - tuned-1"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["analyze", "m", "--base", "b", "--top", "3"], "3 is not a share in (0, 1]"),
        (["suggest", "--base", "b"], "suggest needs --base and models, or --analysis alone"),
        (["suggest", "m", "n"], "--base is missing: the model that the others were tuned from."),
        (
            ["suggest", "m", "--base", "b", "--analysis", "r"],
            "suggest needs --base and models, or --analysis alone",
        ),
        (["norm-weights", "m", "b", "--base", "b"], "b is the base, not one of the models"),
    ],
)
def test_wrong_words_are_a_mistake_of_the_command_line(words: list[str], told: str) -> None:
    from click.testing import CliRunner

    from alnico.cli.main import app

    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", "").split())


def test_a_model_may_be_called_like_a_file_of_the_report(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, 5)
    names = ["summary.json", "report.html", "Retention.JSON", "pairwise_cosines.csv", "summary.json.tmp"]
    places = [old.rename(tmp_path / name) for old, name in zip(tuned, names, strict=True)]
    found = alnico.analyze(places, base=base, out=tmp_path / "report", threads=1)
    assert [m.name for m in found.models] == [f"{name}-2" for name in names]
    assert alnico.read_analysis(tmp_path / "report") == found
    assert alnico.analyze(places, base=base, out=tmp_path / "report", threads=1).models == found.models
    kept = alnico.compare(places[:2], places[2], base=base, out=tmp_path / "kept")
    assert kept.merged.name == "Retention.JSON-2"
    assert (tmp_path / "kept" / "retention.json").is_file()


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (["..", ".", "/", "a/.."], ["model", "model-2", "model-3", "a"]),
        (["a/B", "a/b", "c/B-2"], ["B", "b-2", "B-2-2"]),
        (["x/\u00e9", "y/e\u0301"], ["\u00e9", "e"]),
        (["x/stra\u00dfe", "y/STRASSE"], ["stra\u00dfe", "STRASSE-2"]),
        (["n" * 300, "m/" + "n" * 300], ["n" * 60, "n" * 60 + "-2"]),
        (["a\nb", "a\0b", "a/\\b", "report.html"], ["a-b", "a-b-2", "b", "report.html-2"]),
    ],
)
def test_folders_of_models_are_told_apart_on_every_file_system(
    references: list[str], names: list[str]
) -> None:
    assert short_names(references) == names
    folders = {unicodedata.normalize("NFC", name).casefold() for name in names}
    assert len(folders) == len(names)
    assert all(len(name.encode()) < 250 and "/" not in name for name in names)
