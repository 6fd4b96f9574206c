"""Tests the laws of alnico on a merge method of your own package.

Put this into a test file of your package; pytest then runs every law on the method:

    from alnico.testing import MethodLaws
    from my_package import halfway

    class TestHalfway(MethodLaws):
        method = halfway
        settings = [{}, {"t": 0.3}]

        def reference(self, models, base, options, noise):
            return base + options.get("t", 0.5) * (models[0] - base)

The laws: threads, blocks, tiles, compiling, the order of tensors and an interrupt change no bit; equal inputs are kept
as declared; a GPU gives the same numbers; zeros give zeros; every shape, dtype and number of models is merged; a NaN is
refused; the result agrees with the reference; a merge stays inside its memory budget; the docstring has its parts; options have
ranges; a recipe finds the method.

Each law is also a function of :mod:`alnico.testing.checks`, which takes a :class:`MethodCase` and needs no
pytest:

>>> from alnico.methods import find
>>> from alnico.testing import MethodCase, check_docstring, check_options
>>> case = MethodCase(find("ties"), {"density": 0.2}, models=3)
>>> check_docstring(case), check_options(case)
(None, None)
"""

from alnico.testing.checks import (
    check_backends,
    check_declaration_of_equal_inputs,
    check_docstring,
    check_equal_models,
    check_equation_on_gpu,
    check_first_recipe,
    check_float64,
    check_in_memory,
    check_interrupt_and_resume,
    check_memory,
    check_mixed_dtypes,
    check_not_finite,
    check_numbers_of_models,
    check_odd_shapes,
    check_options,
    check_order_of_tensors,
    check_presets,
    check_reference,
    check_registered,
    check_threads_and_blocks,
    check_tile_size,
    check_zeros,
)
from alnico.testing.method_laws import MethodLaws
from alnico.testing.small_models import BrokenLaw, MethodCase

__all__ = [
    "BrokenLaw",
    "MethodCase",
    "MethodLaws",
    "check_backends",
    "check_declaration_of_equal_inputs",
    "check_docstring",
    "check_equal_models",
    "check_equation_on_gpu",
    "check_first_recipe",
    "check_float64",
    "check_in_memory",
    "check_interrupt_and_resume",
    "check_memory",
    "check_mixed_dtypes",
    "check_not_finite",
    "check_numbers_of_models",
    "check_odd_shapes",
    "check_options",
    "check_order_of_tensors",
    "check_presets",
    "check_reference",
    "check_registered",
    "check_threads_and_blocks",
    "check_tile_size",
    "check_zeros",
]
