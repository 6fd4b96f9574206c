"""The pictures of an analysis, by name, as matplotlib figures."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from made_analyses import made_analysis

from alnico.analysis.charts import DARK, bar_style, mark_style, png_bytes
from alnico.analysis.page import bar_marker, series
from alnico.analysis.pictures import PICTURES
from alnico.errors import AlnicoError


@pytest.mark.parametrize("name", list(PICTURES))
def test_every_picture_is_drawn_of_any_number_of_models(name: str) -> None:
    for models, layers in ((1, 2), (2, 0), (3, 2), (12, 2)):
        figure = made_analysis(models, layers).plot(name, dark=models == 3)
        assert figure.axes, (name, models)
    header = png_bytes(made_analysis(2, 2).plot(name))[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:])) > 100


def test_a_figure_draws_itself_and_belongs_to_nobody() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/analysis'); from made_analyses import made_analysis; "
        "figure = made_analysis(2, 2).plot('bars'); assert figure._repr_png_()[:4] == b'\\x89PNG'; "
        "import pickle; pickle.loads(pickle.dumps(figure)); "
        "print('matplotlib.pyplot' in sys.modules, type(figure).__name__)"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "False Figure\n"


def test_names_options_and_models_that_are_not_there_are_answered_with_the_nearest() -> None:
    analysis = made_analysis(3, 2)
    for given, message in (
        ({"name": "cosin"}, r"plot: an analysis has no picture 'cosin'; expected one of 'map', .*\. Did you mean 'cosine'\?"),
        ({"name": "map", "over": "mlp"}, r"plot: 'map' takes no over=; expected one of 'cosine', "),
        ({"name": "cosine", "over": "mpl"}, r"over: 'mpl' is no part of these models; .* layer of 0 to 1\. Did you mean 'mlp'\?"),
        ({"name": "layers", "measure": "cosin"}, r"measure: 'cosin' is no measure .* Did you mean 'cosine'\?"),
        ({"name": "bars", "models": ["code"]}, r"models: 'code' is not one of the models; .* Did you mean 'coder'\?"),
        ({"name": "bars", "models": 3}, r"models: 3 is not one of the models; expected a position below 3"),
        ({"name": "bars", "models": []}, r"models: is empty; expected one model or more"),
        ({"name": "bars", "ax": 3}, r"ax: is of type int; expected matplotlib axes"),
    ):  # fmt: skip
        with pytest.raises(AlnicoError, match=f"^{message}"):
            analysis.plot(**given)


def test_models_size_and_axes_are_the_callers() -> None:
    from matplotlib.figure import Figure

    analysis = made_analysis(3, 2)
    figure = analysis.plot("norms", models=["med", 0], figsize=(5, 2), dark=True)
    assert figure.get_size_inches().tolist() == [5, 2]
    axes = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["3 med", "1 coder"]
    lengths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert lengths == [[scope.changes[m].l2 for scope in analysis.groups.values()] for m in (2, 0)]  # type: ignore[union-attr]
    assert axes.containers[0][0].get_facecolor()[:3] == pytest.approx(_rgb(series(2)[0]))
    assert figure.get_facecolor()[:3] == pytest.approx(_rgb(DARK.paper))
    own = Figure()
    panels = own.subplots(2, 2)
    assert analysis.plot("bars", ax=panels[0, 0]) is own
    analysis.plot("subspace", ax=panels[1])
    with pytest.raises(AlnicoError, match=r"^ax: has 1 axes; this picture has 2 panels"):
        analysis.plot("subspace", ax=panels[0, 1])


def test_the_map_has_equal_axes_and_the_points_of_the_analysis() -> None:
    figure = made_analysis(2, 2).plot("map")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert axes.get_aspect() == 1
    assert {t.get_text() for t in axes.texts} >= {"1", "base"}


def test_no_two_models_of_sixteen_look_alike_and_all_look_as_on_the_page() -> None:
    bars = [str(sorted(bar_style(i).items())) for i in range(16)]
    marks = [str(sorted(mark_style(i).items())) for i in range(16)]
    assert len(set(bars)) == len(set(marks)) == 16
    for i in range(16):
        style = bar_style(i)
        assert style.get("color", style.get("edgecolor")) == bar_marker(i)["color"] == mark_style(i)["color"]
        assert bool(style.get("hatch")) == ("pattern" in bar_marker(i))


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
