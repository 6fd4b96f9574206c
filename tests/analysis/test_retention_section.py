"""What a merged model kept, on the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from made_analyses import made_analysis
from test_report import HOSTILE, hostile, written

from alnico.analysis.retention import Retention, measure_distances, measure_retention
from alnico.analysis.retention_section import retention_section
from alnico.analysis.scores import Accuracy


def scored(found: Retention) -> Retention:
    return dataclasses.replace(found, scores=(Accuracy(HOSTILE, 0.375, HOSTILE, 0.5, None, 0.75, None),))


def test_the_section_has_a_row_a_parent_and_group_and_a_line_a_parent_and_layer(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure as Known

    analysis = made_analysis(3, 6)
    found = scored(measure_retention(analysis, 2))
    text, page = written(analysis, tmp_path, sections=[retention_section(found)])
    words = page.words.replace("\xa0", " ")
    assert f"{analysis.models[2].name} is " in words
    assert text.partition("id=kept-table")[2].partition("</table>")[0].count("<tr><td>") == 2 * (
        1 + len(analysis.groups)
    )
    assert "75.0 %" in words
    figure = json.loads(page.data["kept-layers"])
    assert figure["choices"][0]["options"] == ["Projection", "Weight", "Top kept", "Signs agree", "Distance"]
    for view in figure["views"].values():
        Known(data=view["data"], layout=view["layout"])
    second = figure["views"]["0"]["data"][1]
    shares = [scope.parents[1] for scope in found.layers.values()]
    assert second["y"] == [
        share and share.projection and float(f"{share.projection:.6g}") for share in shares
    ]


def test_without_a_base_the_section_has_distances_alone(tmp_path: Path) -> None:
    analysis = made_analysis(2, 3)
    found = dataclasses.replace(measure_distances(analysis), notes=("only distances are known: no base.",))
    text, page = written(analysis, tmp_path, sections=[retention_section(found)])
    assert "only distances are known: no base." in page.words
    assert "projection" not in text.partition("id=kept-table")[2].partition("</thead>")[0]
    assert json.loads(page.data["kept-layers"])["choices"][0]["options"] == ["Distance"]
    assert retention_section(measure_distances(made_analysis(2, 0))).figures == []
    (figure,) = retention_section(measure_distances(hostile(analysis))).figures
    assert figure.views["0"]["data"][0]["name"].startswith("1 &lt;/script&gt;")
