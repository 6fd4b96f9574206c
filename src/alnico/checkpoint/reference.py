"""Parses references to models: paths, hub ids, and ``base+adapter``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from alnico.checkpoint.file_arguments import model_paths
from alnico.checkpoint.near_paths import is_misspelling, near_path
from alnico.checkpoint.remote.open_folder import checked_url, is_url
from alnico.checkpoint.task_vectors.store_folder import PREFIX
from alnico.checkpoint.training.recognise import training_folder
from alnico.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit, in full."""


HUB_ADDRESS = re.compile(
    r"(https?://)?(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com)/(models/)?(?P<id>[\w.-]+/[\w.-]+?)"
    r"(\.git)?(/(tree|blob|resolve)/(?P<revision>[\w.-]+))?(/[^ ]*)?"
)
"""The address of a model's page on the hub."""


STEP = re.compile(r"(?P<run>.+)@(?P<step>\d{1,15})", re.DOTALL)
ANCHORS = "anchors"
"""The folder, in that of a training run, of the whole models that its sparse deltas follow on."""


def is_path(reference: str) -> bool:
    """Does a reference lead to something on this machine: a path, a step of a training run, or a part of a checkpoint?"""
    try:
        return Path(os.path.expanduser(reference)).exists() or is_inside_path(reference)
    except PermissionError:  # in another user's folder: opening it gives the error
        return True


def split_step(reference: str) -> tuple[str, int] | None:
    """Return the run and the step of ``RUN@STEP``, where RUN is the folder of a training run with anchors and deltas; None
    for everything else."""
    match = STEP.fullmatch(reference)
    if match is None or not Path(os.path.expanduser(match["run"]), ANCHORS).is_dir():
        return None
    return match["run"], int(match["step"])


PART = re.compile(r"(?P<path>.+)@(?P<part>[A-Za-z_][\w.-]{0,200})", re.DOTALL)


def split_part(reference: str) -> tuple[str, str] | None:
    """Return the path and the part of ``PATH@PART``, where PATH is a trainer's checkpoint on this machine: a pickle, or a folder of
    shards. None for everything else, such as an existing path with this name."""
    match = PART.fullmatch(reference)
    if match is None or os.path.lexists(os.path.expanduser(reference)):
        return None
    path = Path(os.path.expanduser(match["path"]))
    is_checkpoint = (
        path.suffix in PICKLES if path.is_file() else path.is_dir() and training_folder(path) is not None
    )
    return (match["path"], match["part"]) if is_checkpoint else None


def is_inside_path(reference: str) -> bool:
    """Is a reference a step of a training run, or a part of a checkpoint, on this machine?"""
    return split_step(reference) is not None or split_part(reference) is not None


def is_store_reference(reference: str) -> bool:
    """Is a reference the name of a task vector of the user's store, ``store:NAME`` or ``store:NAME@VERSION``?"""
    return reference.startswith(PREFIX)


def is_at_url(reference: str) -> bool:
    """Is a reference the URL of one model? That of a page of the hub is none: it is answered with the model's id.

    >>> [is_at_url(r) for r in ("s3://bucket/model", "s3://bucket/base+s3://bucket/adapter", "https://huggingface.co/org/model")]
    [True, False, False]
    """
    return is_url(reference) and "+" not in reference and HUB_ADDRESS.fullmatch(reference) is None


def check_urls(reference: str) -> None:
    """Refuse a URL with credentials, or that is not spelt as one, in a reference. Errors: ModelError, which shows no secret."""
    for part in reference.split("+"):
        match = WEIGHT.fullmatch(part)
        text = match["adapter"] if match is not None else part
        if is_url(text) and HUB_ADDRESS.fullmatch(text) is None:
            checked_url(text)


def may_hold_model(path: Path) -> bool:
    """Is a path a folder, or a file of a format that holds models?"""
    return path.is_dir() or path.suffix in (".safetensors", ".gguf", ".nemo", *PICKLES)


def refuse_misspelt(reference: str, folder: str = ".") -> None:
    """Refuse a reference that does not exist and misspells a path that does, before anything else is tried.

    An id of the hub with a revision is never taken for a misspelling. Errors: ModelError.
    """
    near = None if "@" in reference or is_url(reference) else near_path(reference, folder, may_hold_model)
    if near is not None and is_misspelling(reference, near):
        where = "" if folder == "." else f" (seen from {folder})"
        on_hub = (
            f" If you mean the model on the hub, write {reference}@main."
            if is_hub_reference(reference)
            else ""
        )
        raise ModelError(
            f"model {reference!r}: no such directory or file; {near} is there{where}. Did you mean {near}?{on_hub}"
        )


def split_adapter(reference: str, exists: Callable[[str], bool]) -> tuple[str, str] | None:
    """Return (base, adapter) of a reference ``base+adapter``; None if the whole reference is a path, or has
    no such parts. The adapter may also be a task vector.

    Each part is an existing path, the URL of a model, or looks like a model on the hub; the adapter may be ``store:NAME``. A ``+`` between two
    paths wins. The adapter may have a weight before it, and the base may itself have adapters: ``base+0.5*a+b`` is ``b``
    on ``base+0.5*a``.

    >>> split_adapter("org/a@v1+org/b", lambda path: False), split_adapter("a+b+c", lambda path: path in ("a+b", "c"))
    (('org/a@v1', 'org/b'), ('a+b', 'c'))
    >>> split_adapter("s3://b/base+0.5*s3://b/a+org/c", lambda path: False)
    ('s3://b/base+0.5*s3://b/a', 'org/c')
    >>> split_adapter("base+0.5*a+-1*b", lambda path: path in ("base", "a", "b"))
    ('base+0.5*a', '-1*b')
    """
    if "+" not in reference or exists(reference):
        return None

    def is_there(part: str) -> bool:
        return exists(part) or is_store_reference(part) or is_at_url(part)

    def is_adapter(part: str) -> bool:
        return exists(part) or is_there(path := split_weight(part)[1]) or is_hub_reference(path)

    def is_base(part: str) -> bool:
        return (
            exists(part)
            or is_hub_reference(part)
            or is_at_url(part)
            or split_adapter(part, exists) is not None
        )

    splits = [(reference[:i], reference[i + 1 :]) for i, c in enumerate(reference) if c == "+"]
    splits = [parts for parts in splits if is_adapter(parts[1]) and is_base(parts[0])]
    return max(splits, key=lambda parts: exists(parts[0]) + is_there(split_weight(parts[1])[1]), default=None)


WEIGHT = re.compile(
    r"(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?:\[(?P<blocks>[\w.=,-]+)\])?\*(?P<adapter>.+)"
)
"""What may stand before an adapter: a weight, and strengths by block."""


def split_weight(adapter: str) -> tuple[float, str]:
    """Return the weight and the path of an adapter as a reference writes it; an existing path wins.

    >>> split_weight("0.5*a"), split_weight("org/a")
    ((0.5, 'a'), (1.0, 'org/a'))
    """
    match = None if is_path(adapter) else WEIGHT.fullmatch(adapter)
    return (float(match["weight"]), match["adapter"]) if match else (1.0, adapter)


def split_blocks(adapter: str) -> str:
    """Return the strengths by block that a reference writes before an adapter; '' if it writes none, or the whole text is a path.

    >>> split_blocks("0.5[IN04=0.5,MID=0]*a"), split_blocks("0.5*a"), split_weight("0.5[MID=0]*a")
    ('IN04=0.5,MID=0', '', (0.5, 'a'))
    """
    match = None if is_path(adapter) else WEIGHT.fullmatch(adapter)
    return (match["blocks"] or "") if match else ""


def is_hub_reference(reference: str) -> bool:
    """Does a reference that is not an existing path look like ``owner/name`` or ``owner/name@revision``?

    >>> [is_hub_reference(r) for r in ("owner/name", "owner/name@v1", "./name", "name", "a/b/c", "a/b.safetensors", "a/b+c/d")]
    [True, True, False, False, False, False, False]
    """
    name = reference.partition("@")[0]
    is_file = name.endswith((".safetensors", ".gguf", ".nemo", *PICKLES))
    return (
        re.fullmatch(r"[^./~\\+$%:][^/\\+$%:]*/[^./\\+$%:][^/\\+$%:]*", name) is not None
        and not is_file
        and "+" not in reference
    )


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Models, adapters or files: paths or hub ids; a single one needs no list."""


def path_list(paths: Paths, argument: str = "models", *, in_memory: str = "") -> list[str]:
    """Return paths or hub ids as a list of strings, also for a single one.

    Errors: RecipeError, ModelError for objects in memory; ``in_memory`` says what does the same with them.
    """
    return model_paths(paths, argument, in_memory=in_memory)
