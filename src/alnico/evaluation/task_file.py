"""Reads tasks from a YAML file, strictly; all mistakes are reported together, each with its line.

Every task has a ``name`` and a ``type``, and may have a ``weight`` in the mean (default 1). Paths are relative to the file.

    tasks:
      - name: reuters
        type: classification
        data: r8.valid.jsonl     # or .csv with a header, or .npz with arrays images (n, channels, height, width) and labels
        text: text               # field or column of the text, and of the label; `label: null` for examples without labels
        label: label
        head: names              # frozen head of label-name embeddings; by default own: the checkpoint's classifier
        labels: {earn: company earnings, acq: company acquisition}   # class to its words, in order; or a list; own head: by default id2label
        encoder: base            # with head: names, the model that embeds the names: the base of the merges
        pooling: mean            # or cls, the first token
        logit_scale: 20
        max_length: 128
        batch_size: 32
        limit: 500               # the first examples; all by default
        precision: float32       # or bfloat16
      - {name: wiki, type: perplexity, data: wiki.txt, window: 512, stride: 512, limit: 64, batch_size: 4, precision: float32}
      - {name: mine, type: call, function: "scoring:accuracy", kind: encoder, metric: accuracy, goal: max}   # needs allow_code
      - {name: arc, type: lm_eval, tasks: [arc_easy], metric: "acc,none", include_path: ., num_fewshot: 0, limit: 200, batch_size: 8}

A task that runs code chosen by the file (``type: call``, ``include_path``, a file among the harness's ``tasks``) is read
only with ``allow_code``, which the caller sets and the file cannot.

See :class:`alnico.evaluation.classification.Classification`, :class:`alnico.evaluation.perplexity.Perplexity`, :class:`alnico.evaluation.user_function.UserFunction` and
:class:`alnico.evaluation.harness.Harness`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alnico.checkpoint.file_kinds import RECIPE, SNIFFED_BYTES, UTF16, not_yaml
from alnico.checkpoint.files import open_named
from alnico.checkpoint.memory_model import is_torch_module
from alnico.checkpoint.near_paths import suggestion
from alnico.checkpoint.reference import is_path, refuse_misspelt
from alnico.errors import AlnicoError, EvaluationError, ModelError, RecipeError
from alnico.evaluation.classification import Classification
from alnico.evaluation.examples import read_examples, read_text
from alnico.evaluation.harness import Harness, is_task_file
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.perplexity import Perplexity
from alnico.evaluation.tasks import EvaluatedModel, Task
from alnico.evaluation.user_function import UserFunction, find_function
from alnico.recipe import scalars
from alnico.recipe.keys import Keys
from alnico.recipe.yaml_nodes import Node, ParseContext, compose, to_plain_data

TASK: Keys = {
    "name": "The name of the task in scores and objectives; each task has another.",
    "type": "classification, perplexity, call or lm_eval.",
    "weight": "The weight of the task in the mean over tasks, above 0; default 1.",
}
"""Keys of every task."""

IN_PRECISION = "float32, or bfloat16 by autocast; default float32."

CLASSIFICATION: Keys = {
    "data": "The examples: JSONL, CSV with a header, or npz with images (n, channels, height, width) and labels.",
    "text": "The field or column of the text; default `text`.",
    "label": "The field or column of the label; default `label`. `null`: the examples have no labels.",
    "head": "own: the checkpoint's classifier (default). names: a frozen head made from the words of the classes.",
    "labels": "Each class and its words, or a list of classes. Default for head own: the id2label of the config.",
    "encoder": "The model that embeds the words of the classes, for head names: the base of the merges.",
    "pooling": "The embedding of a text: mean (over its tokens, the default) or cls (the first token).",
    "logit_scale": "The factor of the cosines under head names; default 20.",
    "max_length": "The most tokens of a text that are read; default 128.",
    "batch_size": "The number of examples in one pass of the model; default 32. Out of memory halves it; on a GPU it doubles while there is room.",
    "limit": "Use only this many examples, the first ones.",
    "precision": IN_PRECISION,
}
PERPLEXITY: Keys = {
    "data": "The text file.",
    "window": "The most tokens that the model sees at once; default 512.",
    "stride": "The number of tokens that a window predicts; default: the window.",
    "limit": "Use only this many windows, the first ones.",
    "batch_size": "The number of windows in one pass of the model; default 4. Out of memory halves it; on a GPU it doubles while there is room.",
    "precision": IN_PRECISION,
}
CALL: Keys = {
    "function": "The function, as module:function. A module next to the tasks file is found first.",
    "kind": "The module that the function gets: encoder (default), classifier or causal.",
    "metric": "The name of the score in the dict that the function returns; default: its only one, else score.",
    "goal": "max (default), or min if lower is better.",
}
LM_EVAL: Keys = {
    "tasks": "The names of tasks in the harness; the score is the mean over them.",
    "metric": "The metric, such as acc, or with its filter acc,none.",
    "include_path": "A folder with more tasks of the harness. Needs --allow-code.",
    "num_fewshot": "The number of solved examples before each question; default: the task's own.",
    "limit": "Use only this many documents of each task, the first ones.",
    "batch_size": "The number of requests in one pass of the model; default 8. Out of memory halves it.",
    "goal": "max (default), or min if lower is better.",
}
"""Keys of the types of tasks, with their meanings for the docs."""

EVERY_KEY = frozenset((*CLASSIFICATION, *PERPLEXITY, *CALL, *LM_EVAL))
TYPE_SYNONYMS = ("kind", "task", "task_type")
"""What people write for `type`, where it is missing."""

MAX_BYTES = 1_000_000
EXPECTED = "a list under tasks, with entries such as {name: news, type: classification, data: news.jsonl}"


TasksLike = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any] | Callable[..., Any] | Task
"""Tasks: a tasks file or a mapping with its content, a task, a function that scores a model, or several of these."""

FUNCTION = "a function that takes a model and returns a number, a task, or the path of a tasks file"


def as_tasks(
    tasks: TasksLike,
    *,
    allow_code: bool = False,
    minimize: bool | Collection[str] = False,
    may_name_others: bool = False,
    argument: str = "tasks",
) -> tuple[Task, ...]:
    """Return tasks from whatever stands for them.

    A function ``f(model) -> float`` is a task, named by its ``__name__``, and a lambda is ``score``; a dict
    ``{"A": f, "B": g}`` gives names. The function receives the module in evaluation mode, or the dict of tensors if no
    module is known; see :class:`alnico.evaluation.user_function.UserFunction`. A tasks file and a mapping with the key
    ``tasks`` are read. A list may hold all of these and tasks. ``minimize`` says for which functions lower is better: all,
    or those with these names, which must be among the tasks unless it ``may_name_others``. ``argument`` is the caller's name of the tasks, for messages.
    Errors: EvaluationError, also for two tasks of one name; those of :func:`read_tasks`.

    >>> [task.name for task in as_tasks({"A": lambda model: 1.0, "B": lambda model: 2.0})]
    ['A', 'B']
    """
    if isinstance(minimize, str):
        minimize = (minimize,)
    if isinstance(tasks, Mapping) and not _is_file_content(tasks):
        named = [(str(name), one, f"{argument}[{name!r}]") for name, one in tasks.items()]
        read = [_task(one, name, where, minimize) for name, one, where in named]
    elif isinstance(tasks, (str, os.PathLike, Mapping)):
        read = list(read_tasks(tasks, allow_code=allow_code))
    elif _is_task(tasks) or callable(tasks):
        read = [_task(tasks, None, argument, minimize)]
    elif not isinstance(tasks, Iterable) or hasattr(tasks, "shape"):
        raise _no_task(tasks, argument)
    else:
        read = []
        for index, one in enumerate(tasks):
            if isinstance(one, (str, os.PathLike, Mapping)):
                where = f"{argument}[{index}]"
                read += as_tasks(
                    one, allow_code=allow_code, minimize=minimize, may_name_others=True, argument=where
                )
            else:
                read.append(_task(one, None, f"{argument}[{index}]", minimize))
    names = [task.name for task in read]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EvaluationError(
            f"{argument}: two are named {twice!r}; expected different names. Give names to functions with a dict: "
            '{"A": f, "B": g}.'
        )
    if (
        not isinstance(minimize, bool)
        and not may_name_others
        and (unknown := next((n for n in minimize if n not in names), None))
    ):
        raise EvaluationError(
            f"minimize names {unknown!r}; expected one of {', '.join(names) or 'the tasks, and there are none'}."
        )
    return tuple(read)


def _is_file_content(tasks: Mapping[Any, Any]) -> bool:
    """Is a mapping the content of a tasks file? One with a function or a task is not."""
    return not any(callable(one) or _is_task(one) for one in tasks.values())


def _is_task(value: Any) -> bool:
    return not isinstance(value, type) and all(hasattr(value, key) for key in ("name", "goal", "evaluate"))


def _task(value: Any, name: str | None, where: str, minimize: bool | Collection[str]) -> Task:
    """Return a task, or a function as one. Errors: EvaluationError for anything else."""
    if _is_task(value):
        if name is None or name == value.name:
            return value  # type: ignore[no-any-return]
        renamed = copy.copy(value)
        renamed.name = name
        return renamed  # type: ignore[no-any-return]
    if not callable(value) or is_torch_module(value):
        raise _no_task(value, where)
    name = name or name_of_function(value)
    is_less_better = minimize if isinstance(minimize, bool) else name in minimize
    return UserFunction(name, value, kind=None, goal="min" if is_less_better else "max")


def name_of_function(function: Callable[..., Any]) -> str:
    """Return the name that a function has in scores.

    >>> name_of_function(len), name_of_function(lambda model: 1.0)
    ('len', 'score')
    """
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    return "score" if name == "<lambda>" else str(name)


def _no_task(value: Any, where: str) -> EvaluationError:
    kind = "None" if value is None else f"of type {type(value).__name__}"
    advice = " Pass the function that scores it." if is_torch_module(value) else ""
    return EvaluationError(f"{where} is {kind}; expected {FUNCTION}.{advice}")


def read_tasks(
    source: str | os.PathLike[str] | Mapping[str, Any],
    folder: str | os.PathLike[str] = ".",
    *,
    allow_code: bool = False,
) -> tuple[Task, ...]:
    """Read tasks from a YAML file or an equivalent mapping; data is read and checked, no model is loaded.

    Paths are relative to the file, or to ``folder`` for a mapping. Without ``allow_code`` a task that would run code is a
    mistake, and no code is run. Errors: EvaluationError, with one line per mistake.
    """
    if isinstance(source, Mapping):
        try:
            text, name = yaml.safe_dump(to_plain_data(source, "the mapping", 0), sort_keys=False), "tasks"
        except RecipeError as error:
            raise EvaluationError(*(line.replace("recipe:", "tasks:", 1) for line in error.args)) from None
        reading = ParseContext(name, has_lines=False)
    else:
        name, folder = os.fsdecode(source), Path(source).parent
        text, reading = _text(name), ParseContext(name)
    reading.expected = EXPECTED
    documents = compose(text, reading)
    if len(documents) > 1:
        reading.wrong(
            documents[1].root.line,
            "a second document begins; expected one list of tasks. Move it to another file.",
        )
    tasks = (
        _tasks(documents[0].root, Path(folder), reading, allow_code)
        if documents and not reading.is_broken
        else []
    )
    if reading.mistakes:
        raise EvaluationError(*reading.error().args)
    return tuple(tasks)


def _text(name: str) -> str:
    try:
        with open_named(name) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise EvaluationError(
                f"{name}: is larger than {MAX_BYTES} bytes; expected a list of tasks. Give the YAML file of the tasks."
            )
        if (kind := not_yaml(data[:SNIFFED_BYTES], name, RECIPE)) is not None:
            advice = kind.advice if kind.is_stand_in or kind is UTF16 else "Give the YAML file of the tasks."
            raise EvaluationError(f"{name}: is {kind.name}; expected a list of tasks. {advice}")
        return data.decode("utf-8")
    except OSError as error:
        hint = suggestion(name, "Check the path of the tasks.", accepts=Path.is_file)
        raise EvaluationError(f"{name}: cannot be read ({error.strerror}). {hint}") from None
    except UnicodeDecodeError:
        raise EvaluationError(
            f"{name}: is not UTF-8 text; expected YAML. Give the YAML file of the tasks."
        ) from None


def _tasks(root: Node, folder: Path, reading: ParseContext, allow_code: bool) -> list[Task]:
    keys = scalars.mapping(root, "the file", ("tasks",), EXPECTED, reading)
    listed = keys.get("tasks")
    if listed is None or not isinstance(listed.value, list) or not listed.value:
        what = "missing" if listed is None else "an empty list" if listed.value == [] else listed.kind
        if isinstance(root.value, dict):
            reading.wrong(
                root.line if listed is None else listed.line, f"tasks is {what}; expected {EXPECTED}."
            )
        return []
    tasks: list[Task] = []
    names: dict[str, int] = {}
    subjects: dict[str, EvaluatedModel] = {}
    for index, node in enumerate(listed.value):
        if not isinstance(node.value, dict):
            reading.wrong(
                node.line,
                f"tasks[{index}] is {node.kind}; expected a mapping such as {{name: news, type: classification, data: news.jsonl}}.",
            )
            continue
        entry = _TaskReader(node, f"tasks[{index}]", folder, reading, subjects, allow_code)
        name = entry.text("name", None)
        if name is not None and name in names:
            reading.wrong(
                node.line,
                f"tasks[{index}].name is {name!r}, like tasks[{names[name]}].name; expected different names.",
            )
        kind = entry.choice("type", tuple(READERS), None)
        if name is None or kind is None:
            continue
        names.setdefault(name, index)
        task = READERS[kind](name, entry)
        if task is not None:
            tasks.append(task)
    return tasks


@dataclasses.dataclass
class _TaskReader:
    """Reads one task. Mistakes are reported to ``reading``; a wrong key gets its default."""

    node: Node
    where: str
    folder: Path
    reading: ParseContext
    subjects: dict[str, EvaluatedModel]
    """Opened encoders, one per path."""
    allow_code: bool
    """Whether the file may name code to run."""
    is_wrong: bool = False

    @property
    def keys(self) -> Mapping[str, Node]:
        keys: dict[str, Node] = self.node.value
        return keys

    def wrong(self, node: Node, message: str) -> None:
        self.is_wrong = True
        self.reading.wrong(node.line, message)

    def runs(self, key: str, what: str) -> None:
        """Report a key that names code to run, unless the caller allows it."""
        node = self.keys.get(key)
        if node is not None and not self.allow_code:
            shown = repr(node.value[:100]) if isinstance(node.value, str) else node.kind
            self.wrong(node, f"{self.where}.{key} is {shown}, {what}; {ASK_FOR_CODE}")

    def __post_init__(self) -> None:
        self._correct(TASK)

    def only(self, *keys: str) -> None:
        """Report all other keys; a misspelt one is read as the key that is missing."""
        self._correct(keys)
        for key, value in self.keys.items():
            if key not in (*TASK, *keys):
                self.wrong(
                    value,
                    f"{self.where} has the unknown key {key[:60]!r}. {scalars.nearest(key, [*TASK, *keys])}",
                )

    def _correct(self, keys: Iterable[str]) -> None:
        known = {*TASK, *keys, *(EVERY_KEY if keys is TASK else ())}
        held: dict[str, Node] = {}
        for key, value in self.keys.items():
            missing = [k for k in keys if k not in self.keys and k not in held]
            means_type = key in TYPE_SYNONYMS and "type" in missing and value.value in [*READERS]
            meant = "type" if means_type else None if key in known else scalars.misspelt_key(key, missing)
            if meant is not None:
                self.wrong(value, f"{self.where} has the unknown key {key[:60]!r}. Did you mean {meant}?")
            held[meant or key] = value
        self.node = dataclasses.replace(self.node, value=held)

    def text(self, key: str, default: str | None) -> str | None:
        """Return one line of text; it is required without a default."""
        if key not in self.keys:
            if default is None:
                self.wrong(self.node, f"{self.where}.{key} is missing; expected text.")
            return default
        text = scalars.text(self.keys[key], f"{self.where}.{key}", self.reading)
        self.is_wrong |= text is None
        return text

    def choice(self, key: str, among: tuple[str, ...], default: str | None) -> str | None:
        node = self.keys.get(key)
        if node is None:
            if default is None:
                self.wrong(self.node, f"{self.where}.{key} is missing; expected {_either(among)}.")
            return default
        if node.value not in among:
            near = difflib.get_close_matches(str(node.value)[:60], among, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            self.wrong(node, f"{self.where}.{key} is {node.kind}; expected {_either(among)}.{hint}")
            return default
        return str(node.value)

    def whole(self, key: str, default: int | None, least: int = 1) -> int | None:
        if key not in self.keys:
            return default
        number = scalars.integer(self.keys[key], f"{self.where}.{key}", least, self.reading)
        self.is_wrong |= number is None
        return number

    def positive(self, key: str, default: float) -> float:
        if key not in self.keys:
            return default
        node = self.keys[key]
        number = scalars.finite_number(node, f"{self.where}.{key}", node.line, self.reading)
        if number is not None and number <= 0:
            self.wrong(node, f"{self.where}.{key} is {number:g}; expected a number above 0.")
        self.is_wrong |= number is None
        return number or default

    def path(self, key: str) -> Path | None:
        """Return the path of a file, relative to the folder of the tasks."""
        path = self.text(key, None)
        return None if path is None else self.folder / Path(os.path.expanduser(path))

    def model(self, key: str) -> str | None:
        """Return a model: a path relative to the folder of the tasks, or a hub id."""
        reference = self.text(key, None)
        if reference is None:
            return None
        path = self.folder / Path(os.path.expanduser(reference))
        if path.exists() or is_path(reference):
            return os.fspath(path) if path.exists() else reference
        try:
            refuse_misspelt(reference, os.fspath(self.folder))
        except ModelError as error:
            self.wrong(self.keys[key], f"{self.where}.{key}: {error}")
        return reference

    def opened(self, reference: str) -> EvaluatedModel:
        if reference not in self.subjects:
            self.subjects[reference] = open_subject(reference)
        return self.subjects[reference]

    def attempt(self, make: Callable[[], Task]) -> Task | None:
        """Make a task from the values; a failure is reported at the task's line. Returns None after any mistake."""
        if self.is_wrong:
            return None
        try:
            return make()
        except AlnicoError as error:
            self.wrong(self.node, f"{self.where}: {error}")
            return None


ASK_FOR_CODE = "expected only data and settings. If you trust the author of this file and the code it names, use --allow-code (in Python allow_code=True)."


def _either(among: tuple[str, ...]) -> str:
    return among[0] if len(among) == 1 else f"{', '.join(among[:-1])} or {among[-1]}"


def _classification(name: str, entry: _TaskReader) -> Task | None:
    entry.only(*CLASSIFICATION)
    data = entry.path("data")
    text = entry.text("text", "text")
    without = "label" in entry.keys and entry.keys["label"].value is None
    label = None if without else entry.text("label", "label")
    head = entry.choice("head", ("names", "own"), "own")
    classes = _labels(entry)
    encoder = entry.model("encoder") if head == "names" or "encoder" in entry.keys else None
    if head == "names" and "labels" not in entry.keys:
        entry.wrong(
            entry.node,
            f"{entry.where}.labels is missing; head: names needs the classes, for example {{earn: company earnings}}.",
        )
    options: dict[str, Any] = {
        "pooling": entry.choice("pooling", ("mean", "cls"), "mean"),
        "logit_scale": entry.positive("logit_scale", 20.0),
        "max_length": entry.whole("max_length", 128),
        "batch_size": entry.whole("batch_size", 32),
        "precision": entry.choice("precision", ("float32", "bfloat16"), "float32"),
        "weight": entry.positive("weight", 1.0),
    }
    limit = entry.whole("limit", None)

    def make() -> Task:
        assert data is not None  # nothing was wrong
        assert text is not None
        examples = read_examples(data, text, label, limit)
        subject = entry.opened(encoder) if head == "names" and encoder is not None else None
        return Classification(
            name, examples.inputs, examples.labels, classes=classes, head=head, encoder=subject, places=examples.places, **options  # type: ignore[arg-type]
        )  # fmt: skip

    return entry.attempt(make)


def _labels(entry: _TaskReader) -> Mapping[str, str] | None:
    """Return the words of each class; in a list, each class is its own word."""
    node = entry.keys.get("labels")
    if node is None:
        return None
    where = f"{entry.where}.labels"
    items = (
        node.value.items()
        if isinstance(node.value, dict)
        else ((None, n) for n in node.value)
        if isinstance(node.value, list)
        else ()
    )
    words: dict[str, str] = {}
    for key, word in items:
        text = str(word.value) if isinstance(word.value, str | int) else None
        if text is None or not text.strip():
            entry.wrong(word, f"{where} contains {word.kind}; expected the words of a class.")
        elif (key or text) in words:
            entry.wrong(word, f"{where} names {text!r} twice; expected each class once.")
        else:
            words[key or text] = text
    if len(words) < 2 and not entry.is_wrong:
        entry.wrong(
            node,
            f"{where} is {node.kind if not words else 'one class'}; expected at least two classes, a list or {{name: words}}.",
        )
    return words


def _perplexity(name: str, entry: _TaskReader) -> Task | None:
    entry.only(*PERPLEXITY)
    data = entry.path("data")
    window = entry.whole("window", 512)
    options: dict[str, Any] = {
        "window": window,
        "stride": entry.whole("stride", window),
        "limit": entry.whole("limit", None),
        "batch_size": entry.whole("batch_size", 4),
        "precision": entry.choice("precision", ("float32", "bfloat16"), "float32"),
        "weight": entry.positive("weight", 1.0),
    }

    def make() -> Task:
        assert data is not None  # nothing was wrong
        return Perplexity(name, read_text(data), **options)

    return entry.attempt(make)


def _call(name: str, entry: _TaskReader) -> Task | None:
    entry.only(*CALL)
    entry.runs("function", "a Python function that would be run")
    function = entry.text("function", None)
    metric = entry.text("metric", "") or None
    options: dict[str, Any] = {
        "kind": entry.choice("kind", ("encoder", "classifier", "causal"), "encoder"),
        "metric": metric,
        "goal": entry.choice("goal", ("max", "min"), "max"),
        "weight": entry.positive("weight", 1.0),
    }

    def make() -> Task:
        assert function is not None  # nothing was wrong
        return UserFunction(name, find_function(function, entry.folder), **options)

    return entry.attempt(make)


def _lm_eval(name: str, entry: _TaskReader) -> Task | None:
    entry.only(*LM_EVAL)
    listed = entry.keys.get("tasks")
    tasks = [n.value for n in listed.value] if listed is not None and isinstance(listed.value, list) else []
    if not tasks or not all(isinstance(task, str) for task in tasks):
        kind = "missing" if listed is None else listed.kind
        entry.wrong(
            listed or entry.node,
            f"{entry.where}.tasks is {kind}; expected a list of names in the harness, for example [arc_easy].",
        )
    entry.runs(
        "include_path",
        "a folder of harness tasks, which may contain Python code and templates that run code",
    )
    if not entry.allow_code and any(is_task_file(task) for task in tasks):
        entry.runs(
            "tasks",
            "with the file of a harness task, which may contain Python code and templates that run code",
        )
    metric = entry.text("metric", None)
    options: dict[str, Any] = {
        "is_packaged": not entry.allow_code,
        "include_path": entry.path("include_path") if "include_path" in entry.keys else None,
        "num_fewshot": entry.whole("num_fewshot", None, 0),
        "limit": entry.whole("limit", None),
        "batch_size": entry.whole("batch_size", 8),
        "goal": entry.choice("goal", ("max", "min"), "max"),
        "weight": entry.positive("weight", 1.0),
    }
    return entry.attempt(lambda: Harness(name, tasks, str(metric), **options))


READERS: Mapping[str, Callable[[str, _TaskReader], Task | None]] = {
    "classification": _classification,
    "perplexity": _perplexity,
    "call": _call,
    "lm_eval": _lm_eval,
}
"""Types of tasks, with what reads each."""
