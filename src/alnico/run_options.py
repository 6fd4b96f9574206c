"""Holds the options that many functions share, with their help texts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SHARED_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "memory": "Memory budget of the whole process, such as 2GiB; a number is bytes.",
        "threads": "Number of threads; default: one per processor.",
        "offline": "Use no network; read models of the hub from its local cache.",
        "allow_code": "Allow tasks files to run code, and a search recipe to open a storage. Use it only if you trust "
        "their authors.",
        "overwrite": "Replace the output when the new one is complete, if alnico wrote it or it is a model.",
        "overwrite_anything": "Replace the output whatever it holds, except inputs, mount points and devices.",
        "restart": "Discard an unfinished earlier run instead of resuming it.",
        "max_shard_size": "Largest size of one output file, such as 5GB; a number is bytes.",
        "strict_license": "Refuse models whose licenses conflict or are unknown.",
        "verify_inputs": "Public key (a PEM file) that must verify the signature of every input; may be repeated.",
        "allow_unsigned": "With verify_inputs: an input that needs no signature, named as in the recipe or by its path; "
        "may be repeated.",
        "require_signed": "With verify_inputs: every input must be signed; allow_unsigned is refused.",
        "unrelated": "What to do with models that were not tuned from one base: error or allow.",
        "top_share": "Share of the entries that count as a model's largest parameters, in (0, 1].",
        "inputs": "Where an input is now: NAME=PATH, with its name as in the lock; may be repeated.",
    }
)
"""The help of options that mean the same for every function. A function's docstring wins; see :func:`option_texts`."""


def option_texts(function: Any) -> dict[str, str]:
    """Return the help of a function's parameters, by name: from its docstring's ``Options:``, else from :data:`SHARED_OPTIONS`.

    In a docstring, ``Options:`` has the docstring's indentation, ``name: text`` is indented by 4, its further lines by 8. The
    entries end at the next line that is not indented. ``watch`` is not an option. A parameter without a text is absent.

    >>> def example(models, *, memory=None):
    ...     '''Do something.
    ...
    ...     Options:
    ...         models: directories, files,
    ...             or owner/name.
    ...     Errors: none.
    ...     '''
    >>> option_texts(example)["models"]
    'directories, files, or owner/name.'
    """
    section = re.search(r"^Options:\n((?: +.*\n?|\n)*)", inspect.getdoc(function) or "", re.MULTILINE)
    entries = re.split(r"^    (\w+): ", section[1] if section else "", flags=re.MULTILINE)
    own = {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}
    texts = {n: own.get(n) or SHARED_OPTIONS.get(n) for n in inspect.signature(function).parameters}
    return {name: text for name, text in texts.items() if text and name != "watch"}
