"""The laws of the house (docs/design.md, section 3), for every method of the registry: those of ``alnico.testing``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.methods import registry
from alnico.testing import (
    MethodCase,
    check_backends,
    check_declaration_of_equal_inputs,
    check_equal_models,
    check_float64,
    check_interrupt_and_resume,
    check_mixed_dtypes,
    check_not_finite,
    check_numbers_of_models,
    check_odd_shapes,
    check_order_of_tensors,
    check_threads_and_blocks,
    check_tile_size,
    check_zeros,
)
from alnico.testing.checks import keeps_equal_models, law_models
from alnico.testing.small_models import random_models
from methods import sides
from methods.cases import IN_EACH_RUN, MODELS, OVER_MODEL, SETTINGS, compiles, counts, options
from methods.merging import merge_arrays

EVERY = [
    pytest.param(name, setting, id=f"{name}-{i}")
    for name in registry()
    for i, setting in enumerate([*SETTINGS.get(name, [{}]), *OVER_MODEL.get(name, [])])
]
NAMES = list(registry())


def allowed(name: str) -> range:
    """The numbers of models that a method takes, up to 12."""
    least, most = registry()[name].models
    return range(least, (most or 12) + 1)


def three(name: str) -> int:
    return MODELS.get(name, (3,))[0]


def case(name: str, setting: dict[str, Any] | None = None, count: int | None = None) -> MethodCase:
    """A method with a setting (the last one), on the usual number of models."""
    count = count or three(name)
    setting = SETTINGS[name][-1] if setting is None else setting
    return MethodCase(registry()[name], options(setting, count), count, sides.made)


Models = tuple[Path, list[Path]]

IN_COMPILED_CODE = pytest.mark.usefixtures("compiled")
"""For laws on what runs inside a kernel. The others take what small tensors take: test_compiling_changes_no_bit compares both."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base and three models in BF16: one tensor of several chunks, one of several leaves, small ones."""
    return law_models(tmp_path_factory.mktemp("laws"), case("linear", {}, 3))


@pytest.fixture
def inputs(models: Models, request: pytest.FixtureRequest) -> Models:
    """As many of the models as the method of the test takes."""
    base, paths = models
    return base, paths[: three(request.getfixturevalue("name"))]


@IN_COMPILED_CODE
@pytest.mark.parametrize(
    ("name", "setting"), [pytest.param(*p.values, id=p.id, marks=compiles(str(p.values[0]))) for p in EVERY]
)
def test_threads_blocks_and_budget_change_no_bit(
    name: str, setting: dict, inputs: Models, tmp_path: Path
) -> None:
    check_threads_and_blocks(case(name, setting), tmp_path, inputs)


@pytest.mark.parametrize(("name", "setting"), EVERY)
def test_compiling_changes_no_bit(name: str, setting: dict, tmp_path: Path) -> None:
    check_backends(case(name, setting), tmp_path, may_need_compiling=False)


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_compiling_changes_no_bit_for_any_number_of_models(name: str, tmp_path: Path) -> None:
    for count in sorted({*counts(name), 1, 2, 9, 12} & set(allowed(name))):
        for i, setting in enumerate(SETTINGS[name]):
            dtypes = ("F16", "F64") if i == len(SETTINGS[name]) - 1 else ("F16",)
            check_backends(
                case(name, setting, count), tmp_path / f"{count}-{i}", dtypes, may_need_compiling=False
            )


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_and_a_resume_change_no_bit(name: str, inputs: Models, tmp_path: Path) -> None:
    check_interrupt_and_resume(case(name), tmp_path, inputs)


@IN_COMPILED_CODE
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tile"),
    [
        pytest.param(
            name, (512, 1536)[i % 2], marks=[] if name in IN_EACH_RUN else [pytest.mark.nightly], id=name
        )
        for i, name in enumerate(NAMES)
    ],
)
def test_the_tile_changes_no_bit(name: str, tile: int, inputs: Models, tmp_path: Path) -> None:
    check_tile_size(case(name), tmp_path, inputs, tile=tile)  # compiles all kernels again


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_tensors_in_the_files_changes_no_value(name: str, tmp_path: Path) -> None:
    check_order_of_tensors(case(name), tmp_path)


def keeps(name: str, setting: dict[str, Any]) -> bool:
    """By declaration; slerp of equal tensors goes along the straight line, whose coefficients sum to 1."""
    return keeps_equal_models(case(name, setting)) or name == "slerp"


@pytest.mark.parametrize(("name", "setting"), [p for p in EVERY if keeps(*p.values)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_models_equal_to_the_base_give_its_bits(name: str, setting: dict, dtype: str, tmp_path: Path) -> None:
    check_equal_models(case(name, setting), tmp_path, dtype)


@pytest.mark.parametrize(("name", "setting"), EVERY)
def test_a_method_does_what_it_declares_of_equal_inputs(name: str, setting: dict, tmp_path: Path) -> None:
    """Elements on which all models agree, among others on which they do not."""
    check_declaration_of_equal_inputs(case(name, setting), tmp_path, may_keep_undeclared=name == "slerp")


@pytest.mark.parametrize("name", NAMES)
def test_odd_shapes_are_merged(name: str, tmp_path: Path) -> None:
    for i, setting in enumerate(SETTINGS[name]):
        check_odd_shapes(case(name, setting), tmp_path / str(i))


@pytest.mark.parametrize(("name", "setting"), EVERY)
def test_zeros_give_zeros(name: str, setting: dict, tmp_path: Path) -> None:
    check_zeros(case(name, setting), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["linear", "ties", pytest.param("model_stock", marks=pytest.mark.nightly)]
)  # each number of models has its own kernels: one method per kind
def test_any_number_of_models_is_merged(name: str, tmp_path: Path) -> None:
    for count in (*counts(name), 4, 5, 6, 7):
        check_numbers_of_models(case(name, SETTINGS[name][0], count), tmp_path, [count])


@IN_COMPILED_CODE
@pytest.mark.parametrize(  # each kind of argument
    "name",
    [
        pytest.param(n, marks=compiles(n))
        for n in ("linear", "karcher", "ties", "dare_linear", "della", "sce")
    ],
)
def test_more_models_than_are_unrolled_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    import importlib

    from references import noise

    base, models = random_models({"w": (70, 40)}, 12)
    given = options(SETTINGS[name][1], 12)
    merged = merge_arrays(tmp_path, name, base, models, given)["w"]
    wide = [m["w"].astype(np.float64) for m in models]
    uniforms = [noise.uniform(0, "w", i, (70, 40)) for i in range(12)]
    expected = importlib.import_module(f"references.{name}").merge(
        wide, base["w"].astype(np.float64), given, uniforms
    )
    assert np.abs(merged - expected).max() / np.abs(expected).max() <= 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_are_decoded_to_float32_and_rounded_once(name: str, tmp_path: Path) -> None:
    """BF16, F16 and F32 inputs give what the same values in F32 files give."""
    check_mixed_dtypes(case(name), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_float64_stays_float64(name: str, tmp_path: Path) -> None:
    import importlib

    from references import noise

    check_float64(case(name), tmp_path, importlib.import_module(f"references.{name}").merge, noise.uniform)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_or_an_infinity_names_tensor_and_index(name: str, bad: float, tmp_path: Path) -> None:
    setting = {"scale": [0.5]} if name == "passthrough" else SETTINGS[name][0]
    check_not_finite(case(name, setting), tmp_path, bad)


def test_an_output_too_large_for_its_dtype_is_an_error(tmp_path: Path) -> None:
    base = {"w": np.full((4, 5), 60_000.0, np.float32)}
    with pytest.raises(
        alnico.errors.NonFiniteError,
        match=r"w\[0, 0\]: the merge gives an infinity in F16; expected a finite number\.",
    ):
        merge_arrays(
            tmp_path, "linear", base, [base, base], {"weight": [1.0, 1.0], "normalize": False}, "F16"
        )
