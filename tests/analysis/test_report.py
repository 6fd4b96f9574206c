"""The page and the pictures of an analysis."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_analyses import made_analysis, suggestion

from alnico.analysis import page
from alnico.analysis.page import Figure, PageSection, figure_html, has_report, inline_json
from alnico.analysis.pictures import write_group_bars
from alnico.analysis.report import write_report
from alnico.analysis.results import Analysis, Skipped
from alnico.analysis.suggest_rules import nothing_left, suggest_recipe
from alnico.errors import AlnicoError
from alnico.recipe.load import load_recipe

HOSTILE = '</script><script>document.title="caught"</script><img src=x onerror=alert(1)>&lt;b> %{y} "quoted\''


class Elements(HTMLParser):
    """Tags, ids and the text of the JSON of figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.data: dict[str, str] = {}
        self.words = ""
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = dict(attributes)
        self.tags.append(tag)
        self.ids += [known["id"]] if known.get("id") else []
        self.links += [str(known["href"])] if tag == "a" else []
        self.inside = str(known.get("id", tag)) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is None:
            self.words += data
        elif self.inside != "script":
            self.data[self.inside] = self.data.get(self.inside, "") + data


def written(analysis: Analysis, folder: Path, **more: Any) -> tuple[str, Elements]:
    write_report(analysis, folder / "report.html", **more)
    text = (folder / "report.html").read_text()
    return text, Elements(text)


def hostile(analysis: Analysis) -> Analysis:
    """The same with names of tensors, modules and models that would run in a careless page."""
    return dataclasses.replace(
        analysis,
        base=dataclasses.replace(analysis.base, name=HOSTILE, reference=HOSTILE),
        models=tuple(
            dataclasses.replace(m, name=f"{HOSTILE}{i}", reference=HOSTILE)
            for i, m in enumerate(analysis.models)
        ),
        tensors=tuple(
            dataclasses.replace(t, name=f"{HOSTILE}.{t.name}", module=f"{HOSTILE}.{t.module}")
            for t in analysis.tensors
        ),
        skipped=(Skipped(HOSTILE, HOSTILE, 3, HOSTILE),),
    )


@pytest.mark.parametrize(("models", "layers"), [(1, 0), (1, 2), (2, 6), (3, 1), (9, 2)])
def test_every_link_leads_to_a_section_and_every_figure_has_its_data(
    models: int, layers: int, tmp_path: Path
) -> None:
    text, found = written(made_analysis(models, layers), tmp_path)
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert set(re.findall(r'data-figure="([^"]+)"', text)) == set(found.data)
    assert ("layers" in found.ids) == (models > 1 and layers > 1)
    assert ("map" in found.ids) == ("map-drawing" in found.data) == (models > 1)


def test_every_figure_is_one_that_plotly_knows_in_every_choice(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure as Known

    _, found = written(made_analysis(5, 3), tmp_path)
    seen = 0
    for data in found.data.values():
        figure = json.loads(data)
        counts = [len(choice["options"]) for choice in figure["choices"]]
        assert len(figure["views"]) == math.prod(counts)
        for view in figure["views"].values():
            Known(data=view["data"], layout=view["layout"])
            Known(layout=view.get("narrow", {}))
            seen += 1
    assert seen > 40


def test_the_page_says_the_numbers_of_the_analysis(tmp_path: Path) -> None:
    analysis = made_analysis(2, 6)
    first = dataclasses.replace(
        analysis.whole.changes[0], l2=43.215, relative_l2=0.0123, unchanged=0.25, max_abs=0.5
    )  # type: ignore[type-var]
    pair = dataclasses.replace(analysis.whole.pairs[0], cosine=-0.5, sign_conflict=0.61)
    whole = dataclasses.replace(
        analysis.whole, changes=(first, None), pairs=(pair,), sign_conflict=0.375, cancelled=None
    )
    _, found = written(
        dataclasses.replace(analysis, whole=whole), tmp_path, advice=suggestion("ties < dare & so on")
    )
    words = found.words.replace("\xa0", " ")
    for said in (
        "1.23 %",
        "43.2",
        "25.0 %",
        "0.500",
        "\N{MINUS SIGN}0.50",
        "61%",
        "37.5 %",
        "changed, 37.5 % have opposite signs (50 % is chance).",
        "ties < dare & so on",
        "none of its tensors could be compared",
    ):
        assert said in words, said
    assert "Adding the task vectors" not in words  # the share is unknown


def test_the_suggested_recipe_can_be_copied_and_its_comments_are_lists(tmp_path: Path) -> None:
    analysis = made_analysis(2, 6)
    advice = suggest_recipe(analysis)
    assert advice.recipe is not None
    text, found = written(analysis, tmp_path, advice=advice)
    recipe = html.unescape(
        text.partition('<div class="copy">')[2].partition("<pre>")[2].partition("</pre>")[0]
    )
    assert recipe in advice.recipe
    assert recipe.startswith(f"merge_method: {advice.method}\n")
    assert load_recipe(recipe).merge_method == advice.method
    assert [
        line for line in (*advice.reasons, *advice.findings, *advice.warnings) if line not in found.words
    ] == []
    nothing, found = written(analysis, tmp_path, advice=nothing_left(["a is left out: it equals the base."]))
    assert "a is left out: it equals the base." in found.words
    assert '<div class="copy">' not in nothing


@pytest.mark.parametrize(
    ("name", "title"), [("base", "2 models and the base"), ("Llama", "2 models and the base Llama")]
)
def test_the_title_names_the_base_once(name: str, title: str, tmp_path: Path) -> None:
    analysis = made_analysis(2, 1)
    text, _ = written(
        dataclasses.replace(analysis, base=dataclasses.replace(analysis.base, name=name)), tmp_path
    )
    assert f"<h1>{title}</h1>" in text


def test_cells_of_a_heat_map_take_experts_together_by_the_root_of_the_sum_of_squares(tmp_path: Path) -> None:
    analysis = made_analysis(1, 1)
    one = next(t for t in analysis.tensors if t.module == "mlp.up_proj.weight")
    change = one.changes[0]
    assert change is not None
    experts = tuple(
        dataclasses.replace(
            one,
            name=f"model.layers.0.mlp.experts.{e}.up_proj.weight",
            module=f"mlp.experts.{e}.up_proj.weight",
            changes=(dataclasses.replace(change, l2=l2, relative_l2=l2 / base),),
        )
        for e, (l2, base) in enumerate([(3.0, 60.0), (4.0, 80.0), (12.0, 240.0 * 2)])
    )
    _, found = written(dataclasses.replace(analysis, tensors=experts), tmp_path)
    view = json.loads(found.data["map-0"])["views"][""]
    (row,) = view["table"]["rows"]
    assert row[0] == "mlp.experts.*.up_proj"
    assert row[1] == pytest.approx(100 * 13 / math.sqrt(60**2 + 80**2 + 480**2), rel=1e-5)
    assert view["data"][0]["customdata"][0][0][1] == 13


def test_stacks_of_layers_with_the_same_parts_have_rows_of_their_own(tmp_path: Path) -> None:
    analysis = made_analysis(1, 2)
    decoder = tuple(
        dataclasses.replace(t, name=t.name.replace("model.layers", "decoder.layers"))
        for t in analysis.tensors
        if t.layer is not None
    )
    _, found = written(dataclasses.replace(analysis, tensors=analysis.tensors + decoder), tmp_path)
    rows = [row[0] for row in json.loads(found.data["map-0"])["views"][""]["table"]["rows"]]
    assert len(rows) == 18
    assert {"model.layers: mlp.up_proj", "decoder.layers: mlp.up_proj"} <= set(rows)


def test_names_cannot_write_the_page(tmp_path: Path) -> None:
    plain, _ = written(made_analysis(2, 2), tmp_path)
    text, found = written(hostile(made_analysis(2, 2)), tmp_path)
    assert found.tags.count("script") == Elements(plain).tags.count("script")
    assert "img" not in found.tags
    assert "<img" not in text.partition("<script>\n/**")[0]
    assert HOSTILE in found.words


def test_json_in_a_page_ends_no_script_and_holds_no_infinity() -> None:
    text = inline_json({"a": ["</script><!--", math.inf, math.nan, "\u2028&"], "b": (0.1234567891,)})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": ["</script><!--", None, None, "\u2028&"], "b": [0.123457]}


def test_more_sections_stand_after_the_models(tmp_path: Path) -> None:
    figure = Figure(
        "kept-bars", "Bars", {"": {"data": [{"type": "bar", "x": [1], "y": [2]}], "layout": {"height": 100}}}
    )
    section = PageSection("kept", "What <it> kept", ["Words & more."], figure_html(figure), [figure])
    _, found = written(made_analysis(2, 2), tmp_path, sections=[section])
    assert found.ids.index("models") < found.ids.index("kept") < found.ids.index("where")
    assert "kept-bars" in found.data
    assert "What <it> kept" in found.words


def test_lists_that_would_be_endless_are_cut_and_say_so(tmp_path: Path) -> None:
    skipped = [Skipped(f"tensor.{n}", None, 1, "other shape") for n in range(1234)]
    text, found = written(made_analysis(1, 1, skipped=skipped), tmp_path)
    assert "1,234 tensors with 1,234 elements" in found.words
    assert "The first 100 are listed here, all of them in summary.json." in found.words
    assert text.count("other shape") == 100


def test_without_the_extra_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_report()
    monkeypatch.setattr(page, "EXTRA", ("plotly", "no_such_package"))
    assert not has_report()
    for missing in ("plotly", "plotly.offline", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, missing, None)
    says = r"needs {}, which is not installed\. Run: pip install .*\[report\]'( |$)"
    with pytest.raises(AlnicoError, match=r"^report\.html " + says.format("plotly")):
        write_report(made_analysis(1, 1), tmp_path / "report.html")
    with pytest.raises(AlnicoError, match=r"^group_l2_bar\.png " + says.format("matplotlib")):
        write_group_bars(made_analysis(1, 1), tmp_path / "group_l2_bar.png")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AlnicoError, match=r"^plot\(\) " + says.format("matplotlib")):
        made_analysis(1, 1).plot("bars")


def test_importing_the_report_loads_neither_plotly_nor_matplotlib() -> None:
    code = "import alnico.analysis.report, alnico.analysis.charts, sys; print(sorted({'plotly', 'matplotlib'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_the_bars_are_the_l2_norms_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure as Picture

    saved: list[Picture] = []
    save = Picture.savefig
    monkeypatch.setattr(
        Picture, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1]
    )
    analysis = made_analysis(3, 2, names=["$x_{1", "b", "c"])
    backwards = dataclasses.replace(analysis, groups=dict(reversed(analysis.groups.items())))
    for models in (None, [1]):
        write_group_bars(backwards, tmp_path / "group_l2_bar.png", models)
        header = (tmp_path / "group_l2_bar.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", header[16:])) > 300
        axes = saved.pop().axes[0]
        names = {text.get_text() for text in axes.texts}
        assert names == ({r"\$x_{1", "b", "c"} if models is None else set())
        lengths = [[bar.get_width() for bar in bars] for bars in axes.containers]
        shown = range(3) if models is None else models
        assert lengths == [[scope.changes[m].l2 for scope in analysis.groups.values()] for m in shown]  # type: ignore[union-attr]
