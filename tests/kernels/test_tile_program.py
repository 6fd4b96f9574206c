"""Kernels for any number of models: one text for all numbers above eight, and the bits that numpy has."""

import dataclasses

import numpy as np
import pytest
from both_ways import in_both_ways

from alnico.engine.kernel_arguments import kind_of
from alnico.kernels.constants import CODES, FEW_MODELS
from alnico.kernels.measure_kernels import ColumnGramKernel, GramKernel, MeasureKernel
from alnico.kernels.mix_kernel import MixKernel
from alnico.kernels.tile_program import TileProgram
from alnico.methods import registry
from alnico.methods.base import Merge


def spread_of_all(delta):
    low = delta[0]
    for i in range(1, len(delta)):
        low = min(low, delta[i])
    high = delta[0]
    for i in range(1, len(delta)):
        high = max(high, delta[i])
    return high - low


def of_everything(delta, noise, drawn, weight, row, side, scale):
    """Two loops over models, one loop inside of a loop, a function with loops, and the first model by itself."""
    total = delta[0]
    for i in range(len(delta)):
        others = 0.0
        for m in range(len(delta)):
            others += delta[m] * side[m]
        share = delta[i] / others if others != 0 else weight[i]
        if noise[i] > 0.25:
            total += share * drawn[i]
        elif row[i] < 0.5:
            total -= weight[i]
    worst = 0.0
    for i in range(len(delta)):
        worst = max(worst, abs(delta[i] - total))
    return total * scale + spread_of_all(delta) / len(delta) - worst


def above_spread(own, delta, limit):
    return 1.0 if abs(own) > limit * spread_of_all(delta) else 0.0


def arithmetic_of_index(delta):
    """The product of a number and an index has a type of its own: this equation is not turned into loops over a tile."""
    total = 0.0
    for i in range(len(delta)):
        total += i * delta[i]
    return total


KINDS = ("noise", "bernoulli", "numbers", "rows", "side", "number")


def numbers(models, size, dtype=np.float32):
    random = np.random.default_rng(models)
    values = random.standard_normal((models, size)).astype(dtype)
    values[:, :99] = values[0, :99]  # some elements are equal in all models
    return values


@pytest.mark.parametrize("real", ["float32", "float64"])
@pytest.mark.parametrize("of_deltas", [False, True])
@pytest.mark.slow
def test_an_equation_of_many_models_has_the_bits_of_numpy(real, of_deltas):
    for models, size in ((9, 2500), (70, 1500), (300, 700)):
        kernel = MixKernel(of_everything, models, of_deltas, KINDS, real)
        assert kernel._program() is not None
        values, sides = numbers(models, size), np.abs(numbers(models, size))
        raws = tuple(v.view(np.uint8) for v in (*values, *sides))
        codes = np.full(2 * models, CODES["F32"])
        base, out = numbers(1, size)[0].view(np.uint8), np.zeros(4 * size, np.uint8)
        random = np.random.default_rng(1)
        keys = random.integers(0, 2**63, models).astype(np.uint64)
        weights = random.random(models).astype(real)
        rows = random.random((models, 100)).astype(real)
        words = np.zeros((models, -(-(64 + size) // 64)), np.uint64)
        drawn = (weights, keys + np.uint64(1), words, 0)
        arguments = (np.zeros(models, real), keys, *drawn, weights, rows, 77, 0.5)
        run = in_both_ways(kernel)
        for keeps_equal in (0, 1):
            assert run(raws, codes, base, CODES["F32"], out, CODES["F32"], 64, keeps_equal, *arguments) == -1


@pytest.mark.slow
def test_a_measure_of_all_values_has_the_bits_of_numpy():
    for models, size in ((9, 70_000), (40, 1500)):
        values = numbers(models, size)
        raws, codes = tuple(v.view(np.uint8) for v in values), np.full(models, CODES["F32"])
        chosen, limits = np.arange(0, models, 2), np.full(models, 0.3, np.float32)
        kernel = MeasureKernel("sum", above_spread, models, True, ("numbers",), "float32", across=True)
        assert kernel._program() is not None
        leaves = np.zeros((chosen.size, -(-size // 65_536)))
        in_both_ways(kernel)(raws, codes, raws[0], CODES["F32"], 0, chosen, leaves, limits)
        assert leaves.any()


def test_products_of_many_models_are_those_of_float64():
    models, size, columns = 19, 5000, 50
    values = numbers(models, size)
    raws, codes = tuple(v.view(np.uint8) for v in values), np.full(models, CODES["F32"])
    nothing = np.empty(0, np.uint8)
    pairs = np.triu_indices(models)
    sums = np.zeros((1, pairs[0].size))
    in_both_ways(GramKernel(models, False, "float32"))(raws, codes, nothing, 0, 0, size, sums)
    exact = values.astype(np.float64) @ values.astype(np.float64).T
    np.testing.assert_allclose(sums[0], exact[pairs], rtol=1e-12, atol=1e-9)
    of_columns = np.zeros((pairs[0].size, columns))
    in_both_ways(ColumnGramKernel(models, False, "float32"))(raws, codes, nothing, 0, 0, of_columns)
    np.testing.assert_allclose(of_columns.sum(axis=1), exact[pairs], rtol=1e-12, atol=1e-9)


def test_an_equation_whose_types_are_unknown_is_compiled_as_it_is():
    kernel = MixKernel(arithmetic_of_index, FEW_MODELS + 1, True, (), "float32")
    assert kernel._program() is None
    assert "def mix(" in kernel.text()


def test_all_numbers_of_models_above_eight_have_one_text():
    for method in registry().values():
        many = FEW_MODELS + 1
        if method.statistics or method.models[1] is not None:
            continue
        merge = method.bind({}, many)
        if isinstance(merge, Merge):
            kinds = tuple(map(kind_of, merge.arguments))
            kernel = MixKernel(merge.mix, many, method.space == "delta", kinds, "float32")
            assert kernel._program() is not None, method.name
            assert kernel.text() == dataclasses.replace(kernel, models=200).text()
    kernel = MixKernel(of_everything, 9, True, KINDS, "float32")
    assert kernel.text() == MixKernel(of_everything, 1000, True, KINDS, "float32").text()
    assert (
        kernel.interface().scratch_bytes
        < MixKernel(of_everything, 1000, True, KINDS, "float32").interface().scratch_bytes
    )
    for kernel_of in (
        lambda k: MeasureKernel("bracket", abs_of, k, True, (), "float32"),
        lambda k: MeasureKernel("sum", abs_of, k, True, (), "float32"),
        lambda k: ColumnGramKernel(k, True, "float32"),
    ):
        assert kernel_of(2).text() == kernel_of(200).text()
    assert GramKernel(FEW_MODELS + 1, True, "float32").text() == GramKernel(200, True, "float32").text()


def test_a_loop_that_asks_for_all_models_does_so_once():
    """pcb and ramplus_tl ask each model about the sum of all: of 200 models that would be 40,000 reads per element."""
    program = TileProgram(above_spread, ("numbers",), "float32", "out = {}".format, own=True)
    chosen = next(i for i, line in enumerate(program._lines) if "chosen.size" in line)
    assert any("range(1, models)" in line for line in program._lines[:chosen])
    assert not any("range(1, models)" in line for line in program._lines[chosen:])


def abs_of(x):
    return abs(x)
