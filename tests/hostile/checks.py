"""The checks of a reader, found in its source, and the reader without one of them."""

from __future__ import annotations

import ast
import importlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from test_house import SOURCE

READERS = (
    "checkpoint/header.py", "checkpoint/file_kinds.py", "checkpoint/files.py", "checkpoint/json_files.py", "checkpoint/source.py", "checkpoint/weight_files.py", "checkpoint/pipelines.py", "checkpoint/file_model.py", "checkpoint/factors.py",
    "checkpoint/quantised/stored_tensors.py", "checkpoint/quantised/coded_rows.py", "checkpoint/quantised/transposed_rows.py", "checkpoint/quantised/fp8.py", "checkpoint/quantised/fp4.py",
    "checkpoint/quantised/integers.py", "checkpoint/quantised/bitsandbytes.py", "checkpoint/quantised/gptq.py", "checkpoint/quantised/awq.py", "checkpoint/quantised/formats.py", "checkpoint/quantised/dequantised_model.py",
    "checkpoint/pickles.py", "checkpoint/pickle_parser.py",
    "checkpoint/adapter_changes.py", "checkpoint/lora_adapter.py", "checkpoint/lora_model.py", "checkpoint/open_adapter.py", "checkpoint/open_model.py",
    "checkpoint/lora_dialects/dialect_adapter.py", "checkpoint/lora_dialects/base_modules.py", "checkpoint/lora_dialects/unfolded_factors.py",
    "checkpoint/statistics.py", "checkpoint/task_vector_file.py",
    "checkpoint/task_vectors/manifest.py", "checkpoint/task_vectors/stored_vector.py", "checkpoint/task_vectors/saved_difference.py", "checkpoint/task_vectors/index_places.py", "checkpoint/task_vectors/delta_chain.py",
    "checkpoint/gguf/value_reader.py", "checkpoint/gguf/file_header.py", "checkpoint/gguf/metadata.py", "checkpoint/gguf/families.py",
    "checkpoint/gguf/model_config.py", "checkpoint/gguf/tokenizer_files.py", "checkpoint/gguf/gguf_model.py", "checkpoint/gguf/open_gguf.py",
    "checkpoint/gguf/written_keys.py", "checkpoint/gguf/gguf_layout.py", "vocabulary/gguf_vocabulary.py", "plan/gguf_output.py",
    "checkpoint/training/trainer_names.py", "checkpoint/training/distributed_checkpoint.py", "checkpoint/training/rank_files.py", "checkpoint/training/model_states.py", "checkpoint/training/optimizer_partitions.py",
    "checkpoint/training/universal_checkpoint.py", "checkpoint/training/storage_shards.py",
    "checkpoint/training/averaged_weights.py", "checkpoint/training/nemo_archive.py", "checkpoint/training/open_training.py",
    "vocabulary/tokenizer.py", "vocabulary/sentencepiece.py", "vocabulary/output_tokenizer.py",
)  # fmt: skip

NO_READING = {
    "open_regular",  # for those who say it in words of their own
    "_check_system",  # about the system
    "read_fully", "write_fully", "copy_fully", "_refuse_changed", "file_states",  # disks that fail, and files that change, while running: tests/output
    "write_statistics", "check_place", "check_statistics_folder", "fetch", "open_vector", "files_on_hub",  # outputs, and the hub
}  # fmt: skip
"""Functions whose errors are not about what a file holds."""


@dataclass(frozen=True)
class Check:
    """One ``raise`` of a reader: where it stands, and its message with ``{}`` for what is put in."""

    file: str
    function: str
    message: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}: {self.function}: {self.message}"


def checks_of(file: str) -> list[Check]:
    """All checks of a file in its order. An exception that is passed on is none."""
    found: dict[tuple[int, int], Check] = {}
    for function in _functions(ast.parse((SOURCE / file).read_text("utf-8"))):
        for node in ast.walk(function):
            if isinstance(node, ast.Raise) and node.exc is not None and function.name not in NO_READING:
                found.setdefault(
                    (node.lineno, node.col_offset),
                    Check(file, function.name, _text(node.exc), node.lineno, node.col_offset),
                )
    return [found[place] for place in sorted(found)]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions and methods, without those inside functions, whose checks count to the outer one."""
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                yield inner


def _text(node: ast.AST) -> str:
    """The text of a message; that of ``refuse(found, expected)`` is both of them."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(v) for v in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.Call):
        return " | ".join(map(_text, node.args))
    return "{}"


class _Without(ast.NodeTransformer):
    """Takes a ``raise`` out; in an ``except`` it lets the error through that was caught."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._is_caught = False

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        before, self._is_caught = self._is_caught, True
        self.generic_visit(node)
        self._is_caught = before
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if (node.lineno, node.col_offset) != (self._check.line, self._check.column):
            return node
        return ast.copy_location(ast.Raise(None, None) if self._is_caught else ast.Pass(), node)


@contextmanager
def without(check: Check) -> Iterator[None]:
    """Run with a check taken out of its reader."""
    path = SOURCE / check.file
    tree = ast.fix_missing_locations(_Without(check).visit(ast.parse(path.read_text("utf-8"))))
    changed = compile(tree, str(path), "exec")
    module = importlib.import_module("alnico." + check.file.removesuffix(".py").replace("/", "."))
    function = _function(module, check, path)
    kept = function.__code__
    code = next(
        c
        for c in _codes(changed)
        if c.co_qualname == kept.co_qualname and c.co_firstlineno == kept.co_firstlineno
    )
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = kept


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _function(module: types.ModuleType, check: Check, path: Path) -> Any:
    """The function or method that holds a check, by its line: names may be twice in a module."""
    holders = [
        module,
        *(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__),
    ]
    found = []
    for holder in holders:
        value = vars(holder).get(check.function)
        value = getattr(value, "func", getattr(value, "fget", getattr(value, "__wrapped__", value)))
        if isinstance(value, types.FunctionType) and value.__code__.co_firstlineno <= check.line:
            found.append(value)
    assert found, f"{path}:{check.line}: {check.function} is not found"
    return max(found, key=lambda f: f.__code__.co_firstlineno)
