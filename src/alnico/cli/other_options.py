"""Answers an option that a command does not have: with its own name of it, or where the value belongs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from alnico.cli.parameters import CommandParameter
from alnico.methods import registry
from alnico.recipe import dialect

OTHER_NAMES = {
    **dict.fromkeys(("output", "output-dir", "output-path", "output-folder", "out-path", "out-dir", "outdir", "save-path", "o"), "out"),
    **dict.fromkeys(("base-model", "basemodel", "b"), "base"),
    **dict.fromkeys(("merge-method", "m"), "method"),
    **dict.fromkeys(("force", "f", "exist-ok"), "overwrite"),
    **dict.fromkeys(("weight", "w", "coefficients"), "weights"),
    **dict.fromkeys(("ratio", "t"), "t"),
    **dict.fromkeys(("torch-dtype", "out-dtype", "output-dtype", "precision"), "dtype"),
    **dict.fromkeys(("model", "model-a", "model-b", "input", "inputs", "finetuned-model"), "models"),
    **dict.fromkeys(("config", "config-file", "yaml", "c"), "recipe"),
    **dict.fromkeys(("lora", "loras", "adapter", "adapter-path", "lora-path", "peft"), "adapters"),
    **dict.fromkeys(("task", "eval-tasks"), "tasks"),
}  # fmt: skip
"""What other programs call an option, and the parameter that it is here."""

WORDS = {
    "models": ("words", "models", "model", "parents", "tuned", "a"),
    "recipe": ("recipe", "words"),
    "base": ("base",),
    "out": ("out",),
    "adapters": ("adapters",),
}
"""By parameter: the arguments that hold it in some command."""


def answer(option: str, parameters: Sequence[CommandParameter], usage: str) -> str:
    """Return what to write in place of an option; "" if nothing is known. ``usage`` is the form of the command."""
    word = option.lstrip("-").replace("_", "-").casefold()
    meant = OTHER_NAMES.get(word, word.replace("-", "_"))
    shown = [p for p in parameters if not p.flag.is_hidden]
    for parameter in shown:
        if parameter.name == meant and not parameter.is_argument:
            return f"Did you mean {' or '.join(parameter.names)}?"
    for parameter in shown:
        is_out = parameter.flag.usage.endswith("OUT") and meant == "out"
        if parameter.is_argument and (parameter.name in WORDS.get(meant, (meant,)) or is_out):
            return f"It is a word without an option here. Write: {usage}."
    is_of_method = any(dialect.meant_option(method, meant) for method in registry().values())
    if is_of_method and any(p.name == "set" for p in shown):
        return f"Options of a merge method are written as --set {meant}=VALUE."
    names = [name for p in shown for long in p.names for name in long.split("/")]
    near = difflib.get_close_matches(option, names, 3, 0.7)
    return f"Did you mean {' or '.join(near)}?" if near else ""
