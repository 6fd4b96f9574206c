"""Coefficients learned from inputs without labels, held against autograd through the stacked sum, and against merges on disk."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alnico
import made
from alnico.errors import EvaluationError, MethodError, MismatchError
from alnico.evaluation.tasks import ModelKind, Score
from alnico.run_options import RunOptions
from alnico.tune.adamerge import AdaMergingResult, LearningOptions, adamerge, entropy, learn

SHAPES = {
    "embed.weight": (6, 5),
    "layers.0.up.weight": (8, 5),
    "layers.0.up.bias": (8,),
    "layers.0.down.weight": (5, 8),
    "layers.1.up.weight": (8, 5),
    "layers.1.up.bias": (8,),
    "layers.1.down.weight": (5, 8),
    "frozen.weight": (5, 5),
}


def learning_options(**changed: Any) -> LearningOptions:
    """The defaults of alnico.adamerge, some of them changed."""
    defaults = {name: one.default for name, one in inspect.signature(adamerge).parameters.items()}
    return LearningOptions(
        **{field.name: defaults[field.name] for field in dataclasses.fields(LearningOptions)} | changed
    )


class Net(torch.nn.Module):
    """Two residual layers; its names are those of a checkpoint."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            *path, leaf = name.split(".")
            place: torch.nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, torch.nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return answer(dict(self.named_parameters()), x)


def answer(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    h = x @ p["embed.weight"]
    for layer in ("layers.0", "layers.1"):
        h = (
            h
            + torch.tanh(h @ p[f"{layer}.up.weight"].T + p[f"{layer}.up.bias"]) @ p[f"{layer}.down.weight"].T
        )
    return h @ p["frozen.weight"]


class InMemory:
    """A subject of one module; ``loads`` are the values it begins with."""

    label = "made"

    def __init__(self, values: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> None:
        self.net = Net(dtype)
        self.net.load_state_dict(
            {name: torch.from_numpy(value).to(dtype) for name, value in values.items()}, strict=bool(values)
        )

    @property
    def directory(self) -> Path:
        raise AssertionError("nothing asks for files")

    def module(self, kind: ModelKind) -> Any:
        return self.net

    def tokenizer(self) -> Any:
        raise AssertionError("nothing asks for a tokenizer")


class Unlabelled:
    """Inputs with a head; whoever asks for labels or a score fails."""

    goal: Any = "max"
    weight: float = 1.0
    kind: ModelKind = "encoder"

    def __init__(self, name: str, inputs: np.ndarray, classes: int = 3) -> None:
        self.name = name
        self.inputs = torch.from_numpy(inputs)
        self.size = len(inputs)
        self.head = torch.from_numpy(np.random.default_rng([5, len(name)]).normal(size=(5, classes)))
        self.asked: list[list[int]] = []

    def logits(self, subject: Any, examples: Sequence[int]) -> torch.Tensor:
        self.asked.append(list(examples))
        hidden: torch.Tensor = subject.module(self.kind)(
            self.inputs[list(examples)].to(next(subject.net.parameters()).dtype)
        )
        return hidden @ self.head.to(hidden.dtype)

    def evaluate(self, subject: Any, examples: Sequence[int] | None = None) -> Score:
        raise AssertionError("a score needs labels")

    def pooled(self, scores: Sequence[Score]) -> Score:
        raise AssertionError("a score needs labels")

    def digests(self) -> frozenset[str]:
        return frozenset()


class Models:
    """A base and two models of it, as files and as arrays; ``frozen.weight`` is equal in all."""

    def __init__(self, folder: Path, dtype: str) -> None:
        random = np.random.default_rng(3)
        base = {name: random.normal(size=shape) * 0.4 for name, shape in SHAPES.items()}
        tuned = [
            {n: v + (n != "frozen.weight") * random.normal(size=v.shape) * 0.3 for n, v in base.items()}
            for _ in range(2)
        ]
        self.paths = [folder / name for name in ("base", "one", "two")]
        for path, values in zip(self.paths, (base, *tuned), strict=True):
            made.save_model(path, {name: (dtype, value) for name, value in values.items()})
        self.base, *self.models = (str(path) for path in self.paths)
        self.values = [
            {
                n: made.decoded(dtype, made.encoded(dtype, v)).astype(np.float64).reshape(v.shape)
                for n, v in values.items()
            }
            for values in (base, *tuned)
        ]

    def learn(
        self, tasks: Sequence[Any], subject: InMemory | None = None, **options: Any
    ) -> AdaMergingResult:
        run = RunOptions(**{n: options.pop(n) for n in ("memory_bytes", "watch") if n in options})
        options = {"steps": 3, "batch_size": 4, **options}
        return learn(
            self.models,
            self.base,
            tasks,
            subject or InMemory(self.values[0]),
            learning_options(**options),
            run=run,
        )


@pytest.fixture
def wide(tmp_path: Path) -> Models:
    return Models(tmp_path, "F64")


def inputs(count: int = 11, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 6))


def two_tasks() -> list[Unlabelled]:
    return [Unlabelled("a", inputs()), Unlabelled("bb", inputs(9, 8), 4)]


def group_of(name: str, per: str) -> str:
    if per == "task":
        return "all"
    return ".".join(name.split(".")[:2]) if per == "layer" and name.startswith("layers") else name


def stacked(
    models: Models,
    tasks: list[Unlabelled],
    per: str,
    batches: list[list[list[int]]],
    *,
    clamp: bool,
    plus: float | None = None,
) -> list[tuple[float, dict[str, np.ndarray]]]:
    """AdaMerging as its authors have it: autograd through the sum of stacked task vectors, torch's Adam. Loss and coefficients of each step."""
    base = {n: torch.from_numpy(v) for n, v in models.values[0].items()}
    vectors = {
        n: torch.stack([torch.from_numpy(values[n]) - base[n] for values in models.values[1:]])
        for n in SHAPES
    }
    if plus is not None:
        for i in range(2):
            every = torch.cat([vectors[n][i].abs().flatten() for n in SHAPES])
            limit = every.sort(descending=True).values[int(plus * every.numel()) - 1]
            for n in SHAPES:
                vectors[n][i][vectors[n][i].abs() < limit] = 0
        for n in SHAPES:
            elected = torch.where(vectors[n].sum(0) >= 0, 1.0, -1.0)
            vectors[n] = torch.where(vectors[n].sign() == elected, vectors[n], 0.0)
    learned = {
        group_of(n, per): torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) for n in SHAPES
    }
    adam = torch.optim.Adam(learned.values(), lr=1e-2)
    course = []
    for batch in batches:
        merged = {n: base[n] + torch.tensordot(learned[group_of(n, per)], vectors[n], 1) for n in SHAPES}
        loss = torch.zeros((), dtype=torch.float64)
        for task, rows in zip(tasks, batch, strict=True):
            chances = torch.softmax(answer(merged, task.inputs[rows]) @ task.head, -1)
            loss = loss + torch.distributions.Categorical(chances).entropy().mean()
        course.append((float(loss.detach()), {g: c.detach().numpy().copy() for g, c in learned.items()}))
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for c in learned.values():
                c.clamp_(0, 1) if clamp else None
    return course


@pytest.mark.parametrize("per", ["task", "layer", "tensor"])
def test_the_course_is_that_of_autograd_through_the_stacked_sum(wide: Models, per: str) -> None:
    tasks = two_tasks()
    found = wide.learn(tasks, per=per, steps=12, learning_rate=1e-2, clamp=None)
    expected = stacked(
        wide, tasks, per, list(map(list, zip(*(t.asked for t in tasks), strict=True))), clamp=False
    )
    assert set(found.groups) == set(expected[0][1]) - {"frozen.weight"}
    for step, (loss, coefficients) in zip(found.steps, expected, strict=True):
        assert step.loss == pytest.approx(loss, rel=1e-12)
        for group, row in zip(found.groups, step.coefficients, strict=True):
            np.testing.assert_allclose(row, coefficients[group], rtol=1e-9)
    assert np.ptp(found.steps[-1].coefficients) > 0.01


class Words(torch.nn.Module):
    """A table of words, looked up, and with ``is_tied`` also the matrix of the last layer."""

    def __init__(self, is_tied: Callable[[], bool]) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(40, 5, dtype=torch.float64)
        self.embed.weight.data.zero_()
        self.out = torch.nn.Linear(5, 4, bias=False, dtype=torch.float64)
        self.is_tied = is_tied

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return of_words(self.embed(input=ids), self.embed.weight, self.out.weight, self.is_tied())


def of_words(hidden: torch.Tensor, table: torch.Tensor, out: torch.Tensor, is_tied: bool) -> torch.Tensor:
    hidden = torch.tanh(hidden.sum(1))
    return torch.cat([hidden @ out.T, hidden @ table.T] if is_tied else [hidden @ out.T], 1)


class WordsTask(Unlabelled):
    def __init__(self) -> None:
        super().__init__("words", np.random.default_rng(2).integers(40, size=(11, 3)))
        self.sparse: list[bool] = []

    def logits(self, subject: Any, examples: Sequence[int]) -> torch.Tensor:
        self.asked.append(list(examples))
        self.sparse.append(subject.net.embed.sparse)
        result: torch.Tensor = subject.net(self.inputs[list(examples)])
        return result


@pytest.mark.parametrize(
    ("tied_from", "asked", "sparse"),
    [(99, 6, [True] * 6), (1, 6, [True] + [False] * 5), (4, 7, [True] * 4 + [False] * 3)],
    ids=["looked up only", "tied", "tied from step 4"],
)
def test_rows_of_a_table_are_computed_where_they_are_looked_up_and_the_course_stays(
    tmp_path: Path, tied_from: int, asked: int, sparse: list[bool]
) -> None:
    random = np.random.default_rng(6)
    values = [
        {"embed.weight": random.normal(size=(40, 5)), "out.weight": random.normal(size=(4, 5))}
        for _ in range(3)
    ]
    for name, one in zip(("base", "one", "two"), values, strict=True):
        made.save_model(tmp_path / name, {n: ("F64", v) for n, v in one.items()})
    task = WordsTask()
    subject = InMemory({})
    subject.net = Words(lambda: len(task.asked) >= tied_from)  # type: ignore[assignment]
    subject.net.load_state_dict({n: torch.from_numpy(v) for n, v in values[0].items()})
    found = learn(
        [str(tmp_path / "one"), str(tmp_path / "two")],
        str(tmp_path / "base"),
        [task],
        subject,
        learning_options(steps=6, batch_size=4, learning_rate=0.05, clamp=None),
    )
    assert (len(task.asked), task.sparse) == (asked, sparse)
    assert subject.net.embed.sparse is False
    base, *vectors = ({n: torch.from_numpy(v) for n, v in one.items()} for one in values)
    learned = {n: torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) for n in base}
    adam = torch.optim.Adam(learned.values(), lr=0.05)
    batches = task.asked if asked == 6 else [*task.asked[:3], *task.asked[4:]]
    for number, (step, rows) in enumerate(zip(found.steps, batches, strict=True), 1):
        merged = {
            n: base[n] + sum(c * (v[n] - base[n]) for c, v in zip(learned[n], vectors, strict=True))
            for n in base
        }
        hidden = merged["embed.weight"][task.inputs[rows]]
        logits = of_words(hidden, merged["embed.weight"], merged["out.weight"], number >= tied_from)
        loss = torch.distributions.Categorical(logits.softmax(-1)).entropy().mean()
        assert step.loss == pytest.approx(float(loss.detach()), rel=1e-12)
        for group, row in zip(found.groups, step.coefficients, strict=True):
            np.testing.assert_allclose(row, learned[group].detach().numpy(), rtol=1e-9)
        adam.zero_grad()
        loss.backward()
        adam.step()
    merged_path = tmp_path / "out"
    alnico.merge(alnico.load_recipe(found.recipe), merged_path)
    with alnico.open_model(merged_path) as model:
        np.testing.assert_array_equal(model.read("embed.weight"), subject.net.embed.weight.detach().numpy())


def test_a_tied_tensor_that_the_files_store_twice_counts_once(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(40, 5, dtype=torch.float64)
            self.out = torch.nn.Linear(5, 4, bias=False, dtype=torch.float64)
            self.head = torch.nn.Linear(5, 40, bias=False, dtype=torch.float64)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return of_words(self.embed(ids), self.head.weight, self.out.weight, True)

    random = np.random.default_rng(7)
    values = []
    for name in ("base", "one", "two"):
        table = random.normal(size=(40, 5))
        values.append({"embed.weight": table, "out.weight": random.normal(size=(4, 5))})
        stored = {**values[-1], "head.weight": table}
        made.save_model(tmp_path / name, {n: ("F64", v) for n, v in stored.items()})
    task = WordsTask()
    subject = InMemory({})
    subject.net = Tied()  # type: ignore[assignment]
    subject.net.load_state_dict({n: torch.from_numpy(v) for n, v in values[0].items()}, strict=False)
    found = learn(
        [str(tmp_path / "one"), str(tmp_path / "two")],
        str(tmp_path / "base"),
        [task],
        subject,
        learning_options(per="task", steps=5, batch_size=4, learning_rate=0.05, clamp=None),
    )
    base, *vectors = ({n: torch.from_numpy(v) for n, v in one.items()} for one in values)
    learned = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([learned], lr=0.05)
    for step, rows in zip(found.steps, task.asked[-5:], strict=True):
        np.testing.assert_allclose(step.coefficients[0], learned.detach().numpy(), rtol=1e-9)
        merged = {
            n: base[n] + sum(c * (v[n] - base[n]) for c, v in zip(learned, vectors, strict=True))
            for n in base
        }
        hidden = merged["embed.weight"][task.inputs[rows]]
        logits = of_words(hidden, merged["embed.weight"], merged["out.weight"], True)
        loss = torch.distributions.Categorical(logits.softmax(-1)).entropy().mean()
        assert step.loss == pytest.approx(float(loss.detach()), rel=1e-12)
        adam.zero_grad()
        loss.backward()
        adam.step()


def test_the_gradient_of_a_tensor_that_the_module_stores_in_another_order_is_put_in_its_order() -> None:
    from alnico.evaluation.module_names import PlacedElements, sum_of

    own, gradient = torch.zeros(3, 2), torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
    part = PlacedElements("w", own, slice(0, 6), torch.tensor([0, 3, 1, 4, 2, 5]))
    found = sum_of([part], 6, lambda _: gradient)
    assert found is not None
    assert found.tolist() == [1, 2, 3, 4, 5, 6]


def test_the_course_after_trim_and_election_is_that_of_autograd_through_what_they_leave(wide: Models) -> None:
    tasks = two_tasks()
    found = wide.learn(tasks, plus=True, density=0.4, steps=8, learning_rate=1e-2)
    batches = list(map(list, zip(*(t.asked for t in tasks), strict=True)))
    for step, (loss, coefficients) in zip(
        found.steps, stacked(wide, tasks, "tensor", batches, clamp=True, plus=0.4), strict=True
    ):
        assert step.loss == pytest.approx(loss, rel=1e-12)
        for group, row in zip(found.groups, step.coefficients, strict=True):
            np.testing.assert_allclose(row, coefficients[group], rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"per": "task"},
        {"per": "layer", "clamp": None},
        {"per": "tensor"},
        {"per": "tensor", "plus": True, "density": 0.4},
        {"per": "layer", "plus": True, "density": 0.4, "scope": "tensor"},
    ],
    ids=str,
)
def test_the_recipe_makes_the_model_that_was_evaluated(tmp_path: Path, options: dict[str, Any]) -> None:
    models = Models(tmp_path, "F32")
    subject = InMemory(models.values[0], torch.float32)
    found = models.learn(two_tasks(), subject, steps=4, learning_rate=0.05, **options)
    alnico.merge(alnico.load_recipe(found.recipe), tmp_path / "out")
    with alnico.open_model(tmp_path / "out") as merged:
        for name, parameter in subject.net.named_parameters():
            np.testing.assert_array_equal(merged.read(name), parameter.detach().numpy(), err_msg=name)


def test_a_module_holds_what_bf16_files_would(tmp_path: Path) -> None:
    models = Models(tmp_path, "BF16")
    subject = InMemory(models.values[0], torch.float32)
    found = models.learn(two_tasks(), subject, learning_rate=0.05)
    alnico.merge(alnico.load_recipe(found.recipe), tmp_path / "out")
    with alnico.open_model(tmp_path / "out") as merged:
        assert {tensor.dtype for tensor in merged.tensors.values()} == {"BF16"}
        for name, parameter in subject.net.named_parameters():
            np.testing.assert_array_equal(merged.read(name), parameter.detach().numpy(), err_msg=name)


def test_a_tensor_whose_coefficients_reach_0_keeps_its_part_in_the_models_threshold(tmp_path: Path) -> None:
    models = Models(tmp_path, "F32")
    subject = InMemory(models.values[0], torch.float32)
    found = models.learn(
        two_tasks(), subject, plus=True, density=0.4, init=0.001, learning_rate=0.05, steps=2
    )
    assert (found.coefficients[:, 1:] == 0).any()
    assert found.coefficients.any(axis=1).all()
    alnico.merge(alnico.load_recipe(found.recipe), tmp_path / "out")
    with alnico.open_model(tmp_path / "out") as merged:
        for name, parameter in subject.net.named_parameters():
            np.testing.assert_array_equal(merged.read(name), parameter.detach().numpy(), err_msg=name)


def test_what_has_no_room_is_read_again_and_changes_no_bit(wide: Models) -> None:
    found, without = (
        wide.learn(two_tasks(), plus=plus, memory_bytes=room).data()
        for plus, room in ((True, 1 << 30), (True, 500))
    )
    assert found == without


def test_a_seed_decides_the_batches_and_the_course(wide: Models) -> None:
    first, again, other = (wide.learn(two_tasks(), seed=seed).data() for seed in (4, 4, 5))
    assert first == again
    assert first["steps"] != other["steps"]


def test_a_batch_of_every_task_is_taken_at_each_step_and_an_input_once_in_a_round(wide: Models) -> None:
    tasks = two_tasks()
    found = wide.learn(tasks, steps=4)
    assert [len(t.asked) for t in tasks] == [4, 4]
    for task in tasks:
        assert all(len(batch) == 4 for batch in task.asked)
        assert len({*task.asked[0], *task.asked[1]}) == len({*task.asked[2], *task.asked[3]}) == 8
    assert found.used == {t.name: len({i for batch in t.asked for i in batch}) for t in tasks}


def test_coefficients_stay_in_the_range_of_the_clamp(wide: Models) -> None:
    found = wide.learn(two_tasks(), learning_rate=0.2, steps=8, clamp=(0.2, 0.4))
    every = np.stack([s.coefficients for s in found.steps])
    assert every.min() == 0.2
    assert every.max() == 0.4


def test_the_module_records_gradients_afterwards_as_it_did_before(wide: Models) -> None:
    subject = InMemory(wide.values[0])
    subject.net.get_parameter("embed.weight").requires_grad_(False)
    wide.learn(two_tasks(), subject)
    assert [n for n, p in subject.net.named_parameters() if not p.requires_grad] == ["embed.weight"]
    assert all(p.grad is None for p in subject.net.parameters())


def test_a_coefficient_without_a_gradient_stays_and_is_named(wide: Models) -> None:
    class Shallow(Unlabelled):
        def logits(self, subject: Any, examples: Sequence[int]) -> torch.Tensor:
            embedding = subject.net.get_parameter("embed.weight")
            return self.inputs[list(examples)] @ embedding @ self.head  # type: ignore[no-any-return]

    found = wide.learn([Shallow("a", inputs())])
    assert set(found.fixed) == set(found.groups) - {"embed.weight"}
    assert all(
        (found.coefficients[i] == 0.3).all() == (group in found.fixed) for i, group in enumerate(found.groups)
    )


def test_a_layers_filter_fits_no_other_stack(tmp_path: Path) -> None:
    recipe = _recipe_of_stacks(tmp_path)
    plan = alnico.plan(recipe)
    weights = {job.name: job.merge.arguments[3] for job in plan.jobs if job.merge is not None}
    assert weights == {"h.0.w": (0.25, 0.5), "vision.h.0.w": (0.75, 1.0), "norm": (0.125, 0.0)}


def _recipe_of_stacks(folder: Path) -> alnico.Recipe:
    from alnico.tune.adamerge import Groups, _mapping, _setting

    names = ["h.0.w", "vision.h.0.w", "norm"]
    for i, model in enumerate(("base", "one", "two")):
        made.save_model(folder / model, {n: ("F32", np.full(4, i + 1.0)) for n in names})
    groups = Groups("layer", names)
    columns = np.array([[0.25, 0.5], [0.75, 1.0], [0.125, 0.0]]).T
    references = [str(folder / m) for m in ("base", "one", "two")]
    return alnico.load_recipe(
        _mapping(references, learning_options(), [_setting(groups, c, 0.3, names) for c in columns])
    )


def test_the_entropy_is_that_of_the_softmax() -> None:
    assert float(entropy(torch.tensor([[0.0, 0.0], [1000.0, 0.0]], dtype=torch.float64))) == pytest.approx(
        np.log(2) / 2
    )


def test_every_step_is_told(wide: Models) -> None:
    told: list[Any] = []
    found = wide.learn(two_tasks(), watch=told.append)
    assert [event.step for event in told] == list(found.steps)
    assert [(event.step.number, event.total) for event in told] == [(1, 3), (2, 3), (3, 3)]


def no_number(subject: Any, examples: Sequence[int]) -> torch.Tensor:
    return next(subject.net.parameters()).sum() * torch.full(
        (len(examples), 3), float("nan"), dtype=torch.float64
    )


def no_graph(_: Any, examples: Sequence[int]) -> torch.Tensor:
    return torch.zeros(len(examples), 3)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            no_number,
            "a: the entropy at step 1 is nan; expected a finite number. "
            "Lower the learning rate, clamp the coefficients, or run the task in float32.",
        ),
        (
            no_graph,
            "a: its loss does not depend on any merged tensor; expected logits computed from the module's parameters. "
            "Give tasks for the merged models, and models that differ from the base.",
        ),
    ],
)
def test_a_loss_that_teaches_nothing_is_an_error(
    wide: Models, logits: Callable[..., torch.Tensor], message: str
) -> None:
    task = Unlabelled("a", inputs())
    task.logits = logits  # type: ignore[method-assign]
    with pytest.raises(EvaluationError) as caught:
        wide.learn([task])
    assert str(caught.value) == message


def test_tasks_must_give_scores_of_classes(wide: Models) -> None:
    class Perplexity:
        name, goal, size = "wiki", "min", 3

    with pytest.raises(EvaluationError) as caught:
        wide.learn([Perplexity()])
    assert str(caught.value) == (
        "wiki: gives no class scores, whose entropy is minimised; expected a classification. Remove the task."
    )
    with pytest.raises(
        EvaluationError, match=r"^a: has no examples; expected at least one input\. Give the task's data\.$"
    ):
        wide.learn([Unlabelled("a", inputs(0))])
    with pytest.raises(EvaluationError, match=r"^tasks: there are none; "):
        wide.learn([])


def test_a_module_of_another_architecture_is_an_error(wide: Models) -> None:
    subject = InMemory(wide.values[0])
    subject.net = torch.nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(
        MismatchError, match=r"^embed.weight: no tensor of the files of .*base is in the module \(Linear\), "
    ):
        wide.learn([Unlabelled("a", inputs())], subject)
    subject.net = torch.nn.Module()  # type: ignore[assignment]
    subject.net.add_module("embed", torch.nn.Linear(2, 2))
    with pytest.raises(
        MismatchError,
        match=r"^embed.weight: is \(6, 5\) in the models, \(2, 2\) in the module \(Module\); expected one shape.",
    ):
        wide.learn([Unlabelled("a", inputs())], subject)


def test_a_classifier_must_mean_the_same_in_all_models(tmp_path: Path) -> None:
    for model, classes in (("base", ("x", "y")), ("one", ("x", "y")), ("two", ("p", "q"))):
        config = {"id2label": dict(enumerate(classes))}
        made.save_model(tmp_path / model, {"w": ("F32", np.ones(3) * len(model))}, config)
    task = Unlabelled("a", inputs())
    task.kind = "classifier"
    one, two, base = (str(tmp_path / m) for m in ("one", "two", "base"))
    with pytest.raises(MismatchError) as caught:
        learn([one, two], base, [task], InMemory({}), learning_options())
    assert str(caught.value).startswith(
        f"a: uses the merged classifier, but {one} has different classes (id2label) from {two}; "
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "head"}, "adamerge: per is 'head'; expected task, layer or tensor. Choose one."),
        ({"scope": "layer"}, "adamerge: scope is 'layer'; expected tensor or model. Choose one."),
        ({"density": 1.5}, "adamerge: density is 1.5; expected a share in (0, 1]. The paper uses 0.2."),
        ({"steps": 0}, "adamerge: steps is 0; expected at least 1. The paper takes 500."),
        (
            {"learning_rate": 0.0},
            "adamerge: learning_rate is 0; expected a number above 0. The paper uses 1e-3.",
        ),
        (
            {"clamp": (1.0, 0.0)},
            "adamerge: clamp is (1.0, 0.0); expected a lower and a higher number, or None. The default is (0, 1).",
        ),
        (
            {"init": 1.2},
            "adamerge: init is 1.2; expected a number from 0 to 1, the range of clamp. Change one of them.",
        ),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_an_error(wide: Models, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError) as caught:
        wide.learn(two_tasks(), **options)
    assert str(caught.value) == message
