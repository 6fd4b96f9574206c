"""The laws of a merge method as a class of tests that pytest runs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from alnico.methods.base import Method
from alnico.testing import checks
from alnico.testing.small_models import MethodCase, method_of


class MethodLaws:
    """Tests of one merge method. Subclass it as ``Test...`` in a test file and set ``method``.

    ``settings`` are the options to test, each a dict. A per-model option is one value for all models, or a
    list, which is cut to the number of models or repeated. ``models`` is the number of models; by default 3,
    or as close to 3 as the method takes.

    Override ``reference`` to compare the method with float64 arithmetic, and ``write_statistics`` if options
    name statistics.
    """

    method: ClassVar[Method | str]
    settings: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    models: ClassVar[int | None] = None
    tolerance: ClassVar[float] = 2e-6
    """The largest error, relative to the largest value of the tensor (float32 arithmetic)."""

    def reference(
        self,
        models: list[np.ndarray],
        base: np.ndarray,
        options: Mapping[str, Any],
        noise: list[np.ndarray],
    ) -> np.ndarray:
        """The merged tensor by the equation of the source, in numpy float64. Override it.

        ``options`` are those of the setting, per-model ones as lists. ``noise`` has one array of uniform
        numbers in [0, 1) per model: those that alnico draws for the tensor.
        """
        raise NotImplementedError

    def write_statistics(self, kind: str, model: Path, position: int) -> Path:
        """Write statistics of a small model for the option ``kind``; return their folder. Override it."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run the tests that take a ``setting`` once per setting."""
        if "setting" in metafunc.fixturenames:
            metafunc.parametrize("setting", list(self.settings))

    def case(self, setting: Mapping[str, Any] | None = None) -> MethodCase:
        """The method with a setting; by default the last."""
        method = method_of(self.method)
        low, high = method.models
        count = self.models or min(max(low, 3), high or 3)
        write = None if type(self).write_statistics is MethodLaws.write_statistics else self.write_statistics
        return MethodCase(method, self.settings[-1] if setting is None else setting, count, write)

    def test_a_recipe_finds_the_method(self) -> None:
        checks.check_registered(self.case())

    def test_the_docstring_has_its_parts_and_every_option(self) -> None:
        checks.check_docstring(self.case())

    def test_options_have_ranges_whose_ends_bind(self) -> None:
        checks.check_options(self.case())

    def test_presets_bind_and_are_explained(self) -> None:
        checks.check_presets(self.case())

    def test_the_first_recipe_is_valid(self) -> None:
        checks.check_first_recipe(self.case())

    def test_threads_and_blocks_change_no_bit(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        checks.check_threads_and_blocks(self.case(setting), tmp_path)

    def test_an_interrupt_and_a_resume_change_no_bit(self, tmp_path: Path) -> None:
        checks.check_interrupt_and_resume(self.case(), tmp_path)

    def test_the_tile_changes_no_bit(self, tmp_path: Path) -> None:
        checks.check_tile_size(self.case(), tmp_path)

    def test_compiling_changes_no_bit(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        checks.check_backends(self.case(setting), tmp_path)

    def test_a_gpu_computes_the_equation_with_the_same_numbers(
        self, setting: Mapping[str, Any], tmp_path: Path
    ) -> None:
        if not checks.has_gpu():
            self._skip("there is no GPU, and NUMBA_ENABLE_CUDASIM=1 is not set, which simulates one")
        checks.check_equation_on_gpu(self.case(setting), tmp_path)

    def test_the_order_of_tensors_changes_no_value(self, tmp_path: Path) -> None:
        checks.check_order_of_tensors(self.case(), tmp_path)

    def test_equal_models_give_their_values(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        case = self.case(setting)
        if checks.keeps_equal_models(case):
            for dtype in ("F32", "BF16"):
                checks.check_equal_models(case, tmp_path / dtype, dtype)

    def test_equal_inputs_are_kept_as_declared(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        checks.check_declaration_of_equal_inputs(self.case(setting), tmp_path)

    def test_odd_shapes_are_merged(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        checks.check_odd_shapes(self.case(setting), tmp_path)

    def test_zeros_give_zeros(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        checks.check_zeros(self.case(setting), tmp_path)

    def test_every_number_of_models_is_merged(self, tmp_path: Path) -> None:
        checks.check_numbers_of_models(self.case(), tmp_path)

    def test_mixed_dtypes_are_decoded_exactly(self, tmp_path: Path) -> None:
        checks.check_mixed_dtypes(self.case(), tmp_path)

    def test_a_nan_or_an_infinity_is_refused(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        if getattr(self.case(setting).bind(), "copies", None) is not None:
            self._skip("with this setting tensors are copied, not read as numbers")
        for bad in (np.nan, np.inf, -np.inf):
            checks.check_not_finite(self.case(setting), tmp_path / str(bad), bad)

    def test_float64_stays_float64(self, tmp_path: Path) -> None:
        checks.check_float64(self.case(), tmp_path, self.reference if self._has_reference() else None)

    def test_it_agrees_with_the_reference(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        if not self._has_reference():
            self._skip("the class has no reference()")
        checks.check_reference(self.case(setting), tmp_path, self.reference, tolerance=self.tolerance)

    def test_memory_and_disk_give_the_same_bits(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        case = self.case(setting)
        if case.method.statistics:
            self._skip("statistics belong to files")
        checks.check_in_memory(case, tmp_path)

    def test_a_gpu_gives_the_same_result(self, setting: Mapping[str, Any], tmp_path: Path) -> None:
        case = self.case(setting)
        if getattr(case.bind(), "runs_on_gpu", False) and importlib.util.find_spec("torch") is not None:
            checks.check_gpu(case, tmp_path)

    def test_a_merge_stays_inside_its_memory_budget(self, tmp_path: Path) -> None:
        case = self.case()
        if case.method.statistics or sys.platform != "linux":
            self._skip("measured on Linux, for methods without statistics")
        checks.check_memory(case, tmp_path)

    def _has_reference(self) -> bool:
        return type(self).reference is not MethodLaws.reference

    def _skip(self, reason: str) -> None:
        import pytest

        pytest.skip(reason)
