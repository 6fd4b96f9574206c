"""Checks that a merge method keeps the laws of alnico: one function per law.

Each function takes a :class:`MethodCase` and, where it merges, an empty folder. It returns None, or raises
:class:`BrokenLaw` with the method, what was found, what was expected and what to do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from alnico.devices import Device, devices_here, made_gpus
from alnico.errors import MethodError, NonFiniteError
from alnico.events import Event, Started, TensorDone, Watcher
from alnico.kernels.constants import LEAF
from alnico.methods.base import MatrixMethod, Merge
from alnico.methods.shared.documentation import first_recipe, read_documentation, recipe_text
from alnico.numerics.noise import noise_key, uniform
from alnico.testing.small_models import (
    BrokenLaw,
    MethodCase,
    merge_arrays,
    method_of,
    model_bytes,
    random_models,
    read_model,
    write_model,
)
from alnico.verification.devices import TOLERANCE, units_apart

Reference = Callable[[list[np.ndarray], np.ndarray, Mapping[str, Any], list[np.ndarray]], np.ndarray]
"""The method on whole float64 arrays: the models, the base, the options (a list per per-model option),
uniform noise per model."""

Draw = Callable[[int, str, int, tuple[int, ...]], Any]
"""Uniform noise in [0, 1): of a seed, a tensor, a model's position and a shape."""

ModelFolders = tuple[Path, list[Path]]
"""The folders of a base and of the models."""

DOCSTRING_PARTS = (
    "\nUse when:",
    "\nOptions:",
    "\nShapes:",
    "\nMeasures:",
    "\nEdge cases:",
    "\nDiffers from the source:",
    "\nSource:",
    "\n>>>",
)
"""The parts of a docstring that every method has, in this order; Options only if it has options."""

LAW_SHAPES = {"large": (2200, 1000), "leaves": (300, 257), "odd": (13, 7), "one": (1,)}
"""A tensor of several chunks, one of several leaves, and small ones."""

REFERENCE_SHAPES = {"a.weight": (37, 129), "b.weight": (8, 4, 3, 3), "c.bias": (1000,)}

BACKEND_SHAPES = {"leaves": (300, 257), "rows": (40, 70), "bias": (17,), "one": (1,)}
"""Tensors whose facts are measured in each way that there is: of several leaves, of rows, of one row."""

GPU_SHAPES = {"rows": (9, 13), "vector": (37,), "stack": (2, 3, 5), "one": (1,)}
"""Few elements: the simulator of a GPU takes milliseconds for each."""

ODD_SHAPES: tuple[tuple[int, ...], ...] = ((1,), (5, 1), (1, 7), (0,), (3, 0), (), (2, 3, 1, 2))

MEASURE_PEAK = """
import json, sys
import alnico
recipe, out, budget = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
result = alnico.merge(recipe, out, memory=budget)
status = open("/proc/self/status").read()  # ru_maxrss would include the size of the parent at the fork
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"peak": peak, "projected": result.plan.memory.peak_bytes}))
"""


def check_registered(case: MethodCase) -> None:
    """A recipe finds the method by its name."""
    method_of(case.method)


def check_docstring(case: MethodCase) -> None:
    """The docstring has a summary of one line and its parts, in order, and explains every option."""
    method, text = case.method, case.method.documentation
    summary, _, rest = text.partition("\n")
    if not summary.endswith(".") or rest.partition("\n")[0]:
        _fail(
            case,
            f"the docstring begins with {summary!r}",
            "one line that ends with a full stop, then an empty line",
            "Shorten the summary",
        )
    parts = [part for part in DOCSTRING_PARTS if part != "\nOptions:" or method.options]
    places = [text.find(part) for part in parts]
    if missing := [part.strip() for part, place in zip(parts, places, strict=True) if place < 0]:
        _fail(
            case,
            f"the docstring has no {', '.join(missing)}",
            f"the parts {' '.join(part.strip() for part in parts)} in this order, each at the start of a line",
            "Add what is missing",
        )
    if places != sorted(places):
        _fail(
            case,
            "the parts of the docstring are in another order",
            f"{' '.join(part.strip() for part in parts)}",
            "Move them",
        )
    documentation = read_documentation(method)
    for cost in (" pass", "Memory: ", "Grain: "):
        if cost not in documentation.parts["Measures"]:
            _fail(
                case,
                f"Measures does not say {cost.strip()!r}",
                "the number of passes, Memory and Grain",
                "Add it to Measures",
            )
    for option in method.options.values():
        if not documentation.options.get(option.name):
            _fail(
                case,
                f"the docstring does not explain the option {option.name}",
                f"a line `    {option.name}: ...` under Options",
                "Add it",
            )
    if extra := sorted(set(documentation.options) - set(method.options)):
        _fail(
            case,
            f"the docstring explains {', '.join(extra)}",
            "options of the signature only",
            "Remove or rename it",
        )


def check_options(case: MethodCase) -> None:
    """Every number has a range, or its docstring says "any number"; the ends of the ranges bind, or are a
    MethodError."""
    method = case.method
    texts = read_documentation(method).options
    options = case.options_of([Path("model")] * case.models, None)
    for option in method.options.values():
        if option.kind != "number":
            continue
        if str(option.range) == "any number" and "any number" not in texts.get(option.name, ""):
            _fail(
                case,
                f"the option {option.name} has no range",
                'a range (Annotated[float, Between(low, high)]), or a docstring that says "any number"',
                "Declare its range",
            )
        ends = {min(max(end, -1e6), 1e6) for end in (option.range.low, option.range.high)} | {0.0}
        for end in sorted(ends):
            value = [end] * case.models if option.per_model else end
            try:
                method.bind({**options, option.name: value}, case.models)
            except MethodError:
                pass
            except Exception as error:
                _fail(
                    case,
                    f"{option.name} = {end:g} raises {type(error).__name__}: {error}",
                    "a Merge or a MethodError",
                    "Narrow the range of the option, or raise MethodError",
                )


def check_presets(case: MethodCase) -> None:
    """Every preset binds, and the docstring explains it under "Presets:"."""
    method = case.method
    for preset, values in method.presets.items():
        lengths = {len(v) for v in values.values() if isinstance(v, tuple)}
        method.bind(values, lengths.pop() if lengths else case.models)
        if f"\n    {preset}: " not in method.documentation.partition("Presets:")[2]:
            _fail(
                case,
                f"the docstring does not explain the preset {preset}",
                f"a line `    {preset}: ...` under Presets",
                "Add it",
            )


def check_first_recipe(case: MethodCase) -> None:
    """The smallest recipe, with the options of "Start with:", is valid and has no notes."""
    import yaml

    import alnico

    method = method_of(case.method)
    recipe = alnico.load_recipe(yaml.safe_load(recipe_text(first_recipe(method))))
    if recipe.notes:
        _fail(
            case,
            f"its first recipe has the notes {'; '.join(map(str, recipe.notes))}",
            "none",
            'Correct "Start with:" in the docstring',
        )


def check_threads_and_blocks(case: MethodCase, folder: Path, inputs: ModelFolders | None = None) -> None:
    """Threads, blocks and the memory budget change no bit."""
    from alnico.engine import merge_run

    inputs = inputs or law_models(folder, case)
    whole = run_case(case, folder / "run", inputs, threads=1, block_elements=64 * LEAF)
    with replaced(merge_run, "SHARED_CHUNKS", 1):  # all threads work on every tensor
        parts = run_case(case, folder / "run", inputs, threads=4, block_elements=LEAF)
    _compare_bytes(case, whole, parts, "with one thread and one block", "with four threads and small blocks")


def check_interrupt_and_resume(case: MethodCase, folder: Path, inputs: ModelFolders | None = None) -> None:
    """A merge that is interrupted and resumed has the bits of one that is not."""
    inputs = inputs or law_models(folder, case)

    def interrupt(event: Event) -> None:
        if isinstance(event, TensorDone):
            raise KeyboardInterrupt

    try:
        run_case(case, folder / "resumed", inputs, watch=interrupt)
    except KeyboardInterrupt:
        pass
    else:
        _fail(case, "the merge was not interrupted", "an interrupt after the first tensor", "Report a bug")
    resumed: list[int] = []

    def count(event: Event) -> None:
        if isinstance(event, Started):
            resumed.append(event.resumed)

    second = run_case(case, folder / "resumed", inputs, watch=count)
    if resumed[0] < 1:
        _fail(case, "the merge started again", "at least one tensor from before", "Report a bug")
    _compare_bytes(case, run_case(case, folder / "whole", inputs), second, "in one run", "after an interrupt")


def check_tile_size(
    case: MethodCase, folder: Path, inputs: ModelFolders | None = None, *, tile: int = 512
) -> None:
    """The number of elements that a kernel holds at a time changes no bit. Compiles the method's kernels
    again."""
    from alnico.kernels import measure_kernels, mix_kernel
    from alnico.kernels.build import compile_kernel
    from alnico.kernels.choice import forced

    inputs = inputs or law_models(folder, case)
    with forced("compiled"):
        usual = run_case(case, folder / "run", inputs)
        with replaced(mix_kernel, "TILE", tile), replaced(measure_kernels, "TILE", tile):
            compile_kernel.cache_clear()
            try:
                small = run_case(case, folder / "run", inputs)
            finally:
                compile_kernel.cache_clear()
    _compare_bytes(case, usual, small, "with usual tiles", f"with tiles of {tile} elements")


def check_backends(
    case: MethodCase,
    folder: Path,
    dtypes: Sequence[str] = ("BF16", "F32"),
    *,
    may_need_compiling: bool = True,
) -> None:
    """Compiled kernels and numpy give the same bytes, for tensors of every size and for zeros of both signs,
    subnormal numbers, and values that are equal in several models. A method that numpy cannot run passes, if
    it ``may_need_compiling``."""
    from alnico.kernels.array_source import NoArrayForm
    from alnico.kernels.choice import forced

    base, models = random_models(BACKEND_SHAPES, case.models, growth=0.05)
    for tensors in (base, *models):
        tensors["leaves"][:5] = base["leaves"][:5]
        tensors["rows"][0, :6] = [-0.0, 0.0, 1e-40, -1e-40, 1e-20, 1.0]
    models[-1]["rows"][0, :6] = [0.0, -0.0, -1e-40, -0.0, 3e-20, 2.0]
    for dtype in dtypes:
        place = folder / dtype
        paths = [write_model(place / f"m{i}", model, dtype) for i, model in enumerate(models)]
        inputs = write_model(place / "base", base, dtype), paths
        with forced("compiled"):
            compiled = run_case(case, place / "run", inputs)
        try:
            with forced("interpreted"):
                interpreted = run_case(case, place / "run", inputs)
        except NoArrayForm as error:
            if may_need_compiling:
                return
            _fail(
                case,
                f"numpy cannot run it: {error}",
                "an equation in which numpy types each step as numba does",
                "Write it so",
            )
        _compare_bytes(case, compiled, interpreted, "compiled", "with numpy")


def has_gpu() -> bool:
    """Can :func:`check_equation_on_gpu` run here: is there a GPU, or was numba-cuda's simulator chosen before numba was imported?"""
    return _is_simulated() or len(devices_here()) > 1


def _is_simulated() -> bool:
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def check_equation_on_gpu(
    case: MethodCase, folder: Path, dtypes: Sequence[str] = ("BF16", "F32", "F64")
) -> None:
    """A merge on a GPU has the numbers of one on the processor, to a unit in the last place of the output's dtype.

    It needs a GPU, or numba-cuda's simulator: set ``NUMBA_ENABLE_CUDASIM=1`` before numba is imported. A method of whole
    matrices passes: :func:`check_gpu` is for it.
    """
    import alnico

    if isinstance(case.bind(), MatrixMethod):
        return
    base, models = random_models(GPU_SHAPES, case.models, growth=0.05)
    with made_gpus([Device("cuda:0", "simulated", 8 << 30)]) if _is_simulated() else nullcontext():
        for dtype in dtypes:
            place = folder / dtype
            paths = [write_model(place / f"m{i}", model, dtype) for i, model in enumerate(models)]
            recipe = case.recipe(paths, write_model(place / "base", base, dtype))
            found = {}
            for device in ("cpu", "cuda"):
                alnico.merge(recipe, place / device, device=device)
                with alnico.open_model(place / device) as model:
                    found[device] = {name: _raw_of(model, name) for name in model.tensors}
            for name, raw in found["cpu"].items():
                apart = int(units_apart(raw, found["cuda"][name], dtype).max())
                if apart > TOLERANCE:
                    _fail(
                        case,
                        f"{name} differs by {apart} units in the last place of {dtype} on a GPU",
                        f"at most {TOLERANCE}",
                        "Use +, -, *, /, sqrt, abs, min and max, which give the same bits everywhere",
                    )


def _raw_of(model: Any, name: str) -> np.ndarray:
    raw = np.empty(model.tensors[name].byte_size, np.uint8)
    model.read_into(name, 0, memoryview(raw))
    return raw


def check_order_of_tensors(case: MethodCase, folder: Path) -> None:
    """The order of the tensors in the files changes no value."""
    base, models = random_models({"a": (40, 30), "b": (500,), "c": (7, 3, 5)}, case.models)
    forwards = merge_arrays(case, folder / "forwards", base, models)
    turned = [{n: m[n] for n in reversed(m)} for m in models]
    backwards = merge_arrays(case, folder / "backwards", {n: base[n] for n in reversed(base)}, turned)
    for name, values in forwards.items():
        if values.tobytes() != backwards[name].tobytes():
            _fail(
                case,
                f"{name} has other bits where the tensors are stored in another order",
                "the same bits",
                "A method may not keep state between tensors",
            )


def check_equal_models(case: MethodCase, folder: Path, dtype: str = "F32") -> None:
    """Models equal to the base give the base's values; in delta space its bits, the sign of zeros
    included."""
    base, _ = random_models({"w": (65, 33), "n": (17,)}, 1)
    base["w"][0, :5] = [-0.0, 0.0, 1e-30, -1e-30, 3.0]
    merged = merge_arrays(case, folder, base, [base] * case.models, dtype)
    expected = read_model(folder / "base")
    for name in base:
        same = np.array_equal(merged[name], expected[name])
        if case.method.space == "delta":
            same = merged[name].tobytes() == expected[name].tobytes()
        if not same:
            _fail(
                case,
                f"models that equal the base in {dtype} change {name}",
                "the base's values",
                "Return exactly 0 for task vectors of zeros, or do not declare fixes_equal_inputs",
            )


def keeps_equal_models(case: MethodCase) -> bool:
    """Whether equal models must give their own values: by the method's declaration, or because it adds to the
    base."""
    merge = case.bind()
    copies = isinstance(merge, Merge) and merge.copies is not None
    return case.method.space == "delta" or merge.fixes_equal_inputs or copies


def check_declaration_of_equal_inputs(
    case: MethodCase, folder: Path, *, may_keep_undeclared: bool = False
) -> None:
    """Elements on which all models agree keep their value where the method declares it, and only there.

    ``may_keep_undeclared`` allows a method to keep them without the declaration.
    """
    merge = case.bind()
    base, models = random_models({"w": (120, 50)}, case.models)
    frozen = np.random.default_rng(1).random((120, 50)) < 0.5
    for model in models:
        model["w"][frozen] = base["w"][frozen]
    merged = merge_arrays(case, folder, base, models)["w"]
    changed = np.argwhere(frozen & (merged != base["w"]))
    must_keep = keeps_equal_models(case) and not isinstance(merge, MatrixMethod)
    if must_keep and changed.size:
        row, column = changed[0]
        _fail(
            case,
            f"changes w[{row}, {column}], on which all models agree, from {base['w'][row, column]} to {merged[row, column]}",
            "its value, as fixes_equal_inputs or the delta space declares",
            "Do not declare fixes_equal_inputs, or keep equal values exactly",
        )
    if not must_keep and not changed.size and not may_keep_undeclared:
        _fail(
            case,
            "keeps all elements on which the models agree and does not declare it",
            "fixes_equal_inputs=True",
            "Declare it",
        )
    if merge.fixes_equal_inputs and case.method.space == "weight":
        # The engine keeps values that are equal; the equation itself must agree on values that nearly are.
        near = [{"w": base["w"] * np.float32(1 + 1e-6 * i)} for i in range(case.models)]
        merged = merge_arrays(case, folder / "near", base, near)["w"]
        apart = np.abs(merged - base["w"])
        if apart.max() > 1e-3 * np.abs(base["w"]).max():
            place = np.unravel_index(int(np.argmax(apart)), apart.shape)
            _fail(
                case,
                f"declares fixes_equal_inputs, but {base['w'][place]:.6g} in all models, within 1e-5, gives {merged[place]:.6g}",
                "that value",
                "Do not declare fixes_equal_inputs, or let the coefficients sum to 1",
            )


def check_odd_shapes(case: MethodCase, folder: Path) -> None:
    """Scalars, empty tensors and tensors of one row or column are merged, with finite results."""
    for i, shape in enumerate(ODD_SHAPES):
        base, models = random_models({"w": shape}, case.models)
        merged = merge_arrays(case, folder / str(i), base, models)["w"]
        if merged.shape != shape or not np.isfinite(merged).all():
            _fail(
                case,
                f"a tensor of shape {shape} gives shape {merged.shape} or values that are not finite",
                "finite values of the same shape",
                "Check divisions by 0",
            )


def check_zeros(case: MethodCase, folder: Path) -> None:
    """A base and task vectors of zeros give zeros."""
    zeros = {"w": np.zeros((20, 30), np.float32)}
    merged = merge_arrays(case, folder, zeros, [zeros] * case.models)["w"]
    if merged.any():
        _fail(
            case,
            f"zeros give {merged[merged != 0][0]}",
            "zeros",
            "Check divisions by 0 and constants that are added",
        )


def check_numbers_of_models(case: MethodCase, folder: Path, counts: Sequence[int] | None = None) -> None:
    """Every number of models that the method declares is merged; by default the least, and up to 4."""
    low, high = case.method.models
    for count in counts or range(low, min(high or 4, max(low, 4)) + 1):
        base, models = random_models({"w": (9, 31)}, count)
        merged = merge_arrays(
            dataclasses.replace(case, models=count), folder / f"{count} models", base, models
        )
        if not np.isfinite(merged["w"]).all():
            _fail(
                case,
                f"{count} models give values that are not finite",
                "finite values",
                "Declare the numbers of models that the method takes: models=(least, most)",
            )


def check_mixed_dtypes(case: MethodCase, folder: Path) -> None:
    """BF16, F16 and F32 inputs give the bits that the same values in F32 files give."""
    import alnico

    base, models = random_models({"w": (33, 65)}, case.models)
    paths = [
        write_model(folder / f"mixed-{i}", model, ("BF16", "F16", "F32")[i % 3])
        for i, model in enumerate(models)
    ]
    base_path = write_model(folder / "mixed-base", base, "BF16")
    exact = [read_model(path) for path in paths]
    alnico.merge(case.recipe(paths, base_path, dtype="float32"), folder / "mixed")
    wide = merge_arrays(
        case,
        folder / "exact",
        {n: v.astype(np.float32) for n, v in read_model(base_path).items()},
        [{n: v.astype(np.float32) for n, v in model.items()} for model in exact],
    )
    if read_model(folder / "mixed")["w"].tobytes() != wide["w"].tobytes():
        _fail(
            case,
            "16-bit inputs give other bits than the same values in float32",
            "the same bits",
            "Report a bug",
        )


def check_not_finite(case: MethodCase, folder: Path, bad: float = np.nan) -> None:
    """A NaN or an infinity in an input is an error that names tensor and index, and leaves nothing behind."""
    base, models = random_models({"w": (70, 40)}, case.models)
    models[-1]["w"][3, 5] = bad
    try:
        merge_arrays(case, folder, base, models)
    except NonFiniteError as error:
        if "w[3, 5]: " not in str(error) or "; expected finite numbers." not in str(error):
            _fail(
                case, f"the error for {bad} says {error}", "the tensor and the index w[3, 5]", "Report a bug"
            )
    else:
        _fail(
            case,
            f"an input with {bad} gives {read_model(folder / 'out')['w'][3, 5]}",
            "a NonFiniteError",
            "Comparisons with NaN are false: add x - x where the result does not depend on x otherwise",
        )
    names = {"base", *(f"m{i}" for i in range(case.models))}
    left = sorted(
        p.name for p in folder.iterdir() if p.name not in names and not (p / "statistics.json").exists()
    )
    if left:
        _fail(case, f"a failed merge leaves {', '.join(left)}", "nothing", "Report a bug")


def check_reference(
    case: MethodCase,
    folder: Path,
    reference: Reference,
    *,
    tolerance: float = 2e-6,
    dtype: str = "F32",
    undecided: Callable[..., np.ndarray] | None = None,
    shapes: Mapping[str, tuple[int, ...]] = REFERENCE_SHAPES,
    draw: Draw | None = None,
    seed: int = 7,
) -> None:
    """The result is within ``tolerance`` of a float64 reference, relative to its largest value.

    ``undecided(models, base, options)`` marks elements where rounding decides, such as votes that tie within
    rounding; they are not compared. ``draw(seed, tensor, position, shape)`` returns the noise; without it
    alnico's own is passed.
    """
    draw = draw or draw_noise
    wide_dtype = np.float64 if dtype == "F64" else np.float32
    base, models = random_models(shapes, case.models, dtype=wide_dtype, growth=0.05)
    merged = merge_arrays(case, folder, base, models, dtype, seed=seed)
    paths = [folder / f"m{i}" for i in range(case.models)]
    options = case.options_of(paths, case.write_statistics)
    for name, shape in shapes.items():
        wide = [m[name].astype(np.float64) for m in models]
        noise = [draw(seed, name, i, shape) for i in range(case.models)]
        expected = np.asarray(reference(wide, base[name].astype(np.float64), options, noise))
        if expected.shape != shape:
            _fail(
                case,
                f"the reference of {name} has shape {expected.shape}",
                f"{shape}",
                "Correct the reference",
            )
        error = np.abs(merged[name] - expected)
        if undecided is not None:
            marked = undecided(wide, base[name].astype(np.float64), options)
            if not (marked.mean() < 1e-5 or marked.sum() <= 1):
                _fail(
                    case,
                    f"{marked.sum()} elements of {name} are undecided",
                    "at most 1 in 100,000",
                    "Mark only those that rounding decides",
                )
            error = np.where(marked, 0.0, error)
        if error.max(initial=0.0) > tolerance * np.abs(expected).max(initial=0.0):
            place = np.unravel_index(int(np.argmax(error)), shape)
            _fail(
                case,
                f"{name}{list(map(int, place))} is {merged[name][place]:.9g}, the reference gives {expected[place]:.9g}",
                f"a difference of at most {tolerance:g} of the largest value, {np.abs(expected).max():.3g}",
                "Compare mix with the equation of the source",
            )


def check_float64(
    case: MethodCase, folder: Path, reference: Reference | None = None, draw: Draw | None = None
) -> None:
    """float64 inputs stay float64; with a reference, the result is within 1e-14 of it."""
    if reference is not None:
        check_reference(
            case, folder, reference, tolerance=1e-14, dtype="F64", shapes={"w": (30, 41)}, draw=draw, seed=0
        )
        merged = read_model(folder / "out")["w"]
    else:
        base, models = random_models({"w": (30, 41)}, case.models, dtype=np.float64)
        merged = merge_arrays(case, folder, base, models, "F64")["w"]
    if merged.dtype != np.float64:
        _fail(case, f"float64 inputs give {merged.dtype}", "float64", "Report a bug")


def check_in_memory(case: MethodCase, folder: Path) -> None:
    """A merge of arrays in memory has the bits of the same merge on disk. Not for methods with statistics."""
    import alnico

    base, models = random_models({"w": (90, 70), "n": (33,)}, case.models)
    on_disk = merge_arrays(case, folder, base, models)
    start = {"first": models[0], "unused": None}.get(case.method.base, base)
    options = case.options_of([folder] * case.models, None)
    in_memory = alnico.merge_state_dicts(models, case.method.name, base=start, unrelated="allow", **options)
    for name, values in on_disk.items():
        if values.tobytes() != np.asarray(in_memory[name]).tobytes():
            _fail(case, f"{name} has other bits in memory than on disk", "the same bits", "Report a bug")


def check_gpu(case: MethodCase, folder: Path, tolerance: float = 1e-8) -> None:
    """Whole matrices have the processor's result on a GPU, which is made of torch's device ``cpu`` here: within the
    tolerance, as a share of a tensor's largest value."""
    base, models = random_models({"w": (90, 70), "v": (40, 80)}, case.models)
    here = merge_arrays(case, folder, base, models, "F64", device="cpu")
    with made_gpus([Device("cuda:0", "torch's cpu", 8 << 30)]):
        there = merge_arrays(case, folder, base, models, "F64", device="cuda")
    for name, values in here.items():
        off = float(np.abs(there[name] - values).max() / max(np.abs(values).max(), 1e-300))
        if not off <= tolerance:
            _fail(
                case,
                f"{name} is {off:.1e} of its largest value from the processor's on a GPU",
                f"at most {tolerance:g}",
                "Compute with what numpy and torch have in common (alnico.numerics.arrays), or leave runs_on_gpu out",
            )


def check_memory(case: MethodCase, folder: Path, budget: int = 400 << 20) -> None:
    """A tensor larger than the budget is merged inside it, and inside the peak that the plan projects. Linux
    only."""
    shapes = {"n": (1000,), "w": (budget // 40_000 + 100, 10_000)}
    models = [_write_sparse(folder / f"m{i}.safetensors", shapes, i) for i in range(case.models + 1)]
    recipe = case.recipe(models[1:], models[0])
    peak = measure_peak(recipe, folder / "out.safetensors", budget)
    (folder / "out.safetensors").unlink()
    if not peak["peak"] <= peak["projected"] <= budget:
        sizes = ", ".join(f"{size / 2**20:.0f} MiB {name}" for name, size in peak.items())
        _fail(
            case,
            f"the merge takes {sizes}",
            f"a peak within the projection, and that within {budget / 2**20:.0f} MiB",
            "Report a bug; for a MatrixMethod, correct its numbers function",
        )


def measure_peak(recipe: Mapping[str, Any], out: Path, budget: int) -> dict[str, int]:
    """Merge in a new process; return its peak resident size and the plan's projection, in bytes. Linux
    only."""
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK, json.dumps(recipe), str(out), str(budget)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    if ended.returncode:
        raise BrokenLaw(f"a merge in {budget} bytes failed: {ended.stderr.strip()}")
    peak: dict[str, int] = json.loads(ended.stdout)
    return peak


def law_models(folder: Path, case: MethodCase) -> ModelFolders:
    """Write a base and models in BF16, of :data:`LAW_SHAPES`, unless they exist."""
    paths = [folder / f"m{i}" for i in range(case.models)]
    if not all((path / "model.safetensors").exists() for path in (folder / "base", *paths)):
        base, models = random_models(LAW_SHAPES, case.models)
        for path, model in zip([folder / "base", *paths], [base, *models], strict=True):
            write_model(path, model, "BF16")
    return folder / "base", paths


def run_case(
    case: MethodCase,
    folder: Path,
    inputs: ModelFolders,
    watch: Watcher | None = None,
    **memory: Any,
) -> dict[str, bytes]:
    """Merge into ``folder``/out with other values in the plan's memory, such as threads; return the bytes of
    its files."""
    import alnico
    from alnico.engine.run import run_plan
    from alnico.engine.stages import close

    base, models = inputs
    method_of(case.method)
    folder.mkdir(parents=True, exist_ok=True)
    plan = alnico.plan(case.recipe(models, base))
    plan = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, **memory))
    try:
        run_plan(plan, folder / "out", overwrite=True, watch=watch)
    finally:
        close([plan])
    return model_bytes(folder / "out")


def draw_noise(seed: int, tensor: str, position: int, shape: tuple[int, ...]) -> np.ndarray:
    """The uniform numbers in [0, 1) that alnico draws for a model's elements."""
    return uniform(noise_key(seed, tensor, position), 0, int(np.prod(shape))).reshape(shape)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a name of a module another value until the block ends."""
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)


def _write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], position: int) -> Path:
    """Write an F32 file whose first million elements per tensor are numbers and the rest holes that read as
    0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    block = (np.random.default_rng(0).standard_normal(1_000_000) * 0.02).astype(np.float32)
    header: dict[str, Any] = {}
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name], end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.seek(8 + len(text) + starts[name])
            values = block[: int(np.prod(shape))] + np.float32(0.001 * position)
            file.write(values.astype(np.float32).tobytes())
        file.truncate(8 + len(text) + end)
    return path


def _compare_bytes(
    case: MethodCase, first: dict[str, bytes], second: dict[str, bytes], one_way: str, other_way: str
) -> None:
    if first != second:
        _fail(
            case,
            f"the merge {one_way} and the merge {other_way} have different bits",
            "the same bits",
            "Use only the values and the arguments of mix; a Derived function may not keep state",
        )


def _fail(case: MethodCase, problem: str, expected: str, advice: str) -> NoReturn:
    options = f" with {dict(case.options)}" if case.options else ""
    raise BrokenLaw(f"{case.method.name}{options}: {problem}; expected {expected}. {advice}.")
