"""The law that a GPU gives the processor's result holds for alnico's methods, and says what breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.methods import registry
from alnico.methods.base import MatrixMethod, combine, method
from alnico.testing import BrokenLaw, MethodLaws
from alnico.testing.checks import check_gpu
from alnico.testing.small_models import MethodCase


@pytest.mark.parametrize("name", ["tsv", "dc_merge", "swudi", "iso_c", "iso_cts", "svd"])
def test_the_law_holds_for_methods_over_whole_matrices(name: str, tmp_path: Path) -> None:
    check_gpu(MethodCase(registry()[name], {}, 3, None), tmp_path)


def test_a_method_that_computes_something_else_there_breaks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves() -> MatrixMethod:
        """Half of the first task vector, or on a GPU a third."""

        def make(matrices: Any) -> Any:
            value = matrices.value(0)
            return value / (2 if isinstance(value, np.ndarray) else 3)

        return MatrixMethod(
            make, lambda rows, columns, *_: 3 * rows * columns, combine((1.0,) * 2), runs_on_gpu=True
        )

    made = method(space="delta", models=(2, 2), source="an example")(halves)
    monkeypatch.setitem(registry().others, "halves", made)

    class Laws(MethodLaws):
        method = made

    with pytest.raises(BrokenLaw) as broken:
        Laws().test_a_gpu_gives_the_same_result({}, tmp_path)
    assert str(broken.value).startswith("halves: w is ")
    assert (
        " of its largest value from the processor's on a GPU; expected at most 1e-08. Compute with what"
        in str(broken.value)
    )


def test_the_law_asks_nothing_of_other_methods(tmp_path: Path) -> None:
    class Laws(MethodLaws):
        method = "ties"

    Laws().test_a_gpu_gives_the_same_result({}, tmp_path)
    assert not list(tmp_path.iterdir())
