"""Knows the flags of mergekit 0.1.5: which change nothing in a merge, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping

import click

from alnico.cli.command import CommandCall
from alnico.cli.options import Flag
from alnico.cli.printing import say

IGNORED: Mapping[str, str] = {
    "copy_tokenizer": "the tokenizer is always carried over",
    "write_model_card": "the model card is always written",
    "lazy_unpickle": "files are always read in part",
    "low_cpu_memory": "--memory is the limit that holds",
    "clone_tensors": "no output shares memory with an input",
    "async_write": "tensors are always written while others are read",
    "read_to_gpu": "on a GPU, tensors are always read while others are copied there and computed",
}
"""Flags that change nothing, and why."""

IGNORED_VALUES: Mapping[str, str] = {
    "write_threads": "--threads is the number of all threads",
    "lora_merge_cache": "an adapter is applied while its base is read",
    "lora_merge_dtype": "an adapter is applied in float32, or in float64 where a model is",
    "transformers_cache": "models of the hub are kept where HF_HOME says",
}
"""The same of options with a value."""

DEVICES: Mapping[str, str] = {"cuda": "cuda", "gpu_rich": "cuda:all", "multi_gpu": "cuda:all"}
"""Flags that mean a device."""

REFUSED: Mapping[str, str] = {
    "trust_remote_code": "alnico runs no code of a model. Leave the option out.",
    "unsafe_truncate_embeddings": "alnico cuts no vocabulary without saying which tokens go. Write tokenizer_source: base in the recipe.",
}
"""Flags for what alnico does not do, and what to do instead."""


MIXTURES_REFUSED: Mapping[str, str] = dict.fromkeys(
    ("load_in_4bit", "load_in_8bit"),
    "alnico runs prompts through a model in bfloat16, float16 or float32. Give --dtype bfloat16.",
)
"""The same of mergekit-moe."""

NOT_USEFUL = "i_understand_this_is_not_useful_without_training"


def _switch(name: str) -> Flag:
    word = name.replace("_", "-")
    return Flag(type=bool, is_hidden=True, spelled=(f"--{word}/--no-{word}",))


FLAGS: Mapping[str, Flag] = {
    **{name: _switch(name) for name in (*IGNORED, *REFUSED, *DEVICES, "safe_serialization")},
    **{name: Flag(type=str, is_hidden=True) for name in IGNORED_VALUES},
}
"""Hidden options of ``alnico merge``. Those that mean something there (--allow-crimes, ...) are declared with it."""


OF_MIXTURES: Mapping[str, Flag] = {name: _switch(name) for name in (*MIXTURES_REFUSED, NOT_USEFUL)}
"""Hidden options of ``alnico moe``, besides those of ``alnico merge``."""


def check_flags(call: CommandCall) -> None:
    """Refuse flags for what alnico does not do, and note those that change nothing. Errors: a wrong command line."""
    for name, why in REFUSED.items():
        if call[name]:
            raise click.BadParameter(f"{_typed(name)}: {why}")
    if call["safe_serialization"] is False:
        raise click.BadParameter(
            "--no-safe-serialization: alnico writes safetensors only. Leave the option out."
        )
    for name, why in {**IGNORED, **IGNORED_VALUES}.items():
        if call[name] is not None:
            say(f"note: {_typed(name, call[name])} has no effect: {why}.", call.is_quiet)


def check_mixture_flags(call: CommandCall) -> None:
    """The same for the flags of mergekit-moe alone. Errors: a wrong command line."""
    for name, why in MIXTURES_REFUSED.items():
        if call[name]:
            raise click.BadParameter(f"{_typed(name)}: {why}")
    if call[NOT_USEFUL] is not None:
        say(f"note: {_typed(NOT_USEFUL)} has no effect: such a mixture is built, with a note.", call.is_quiet)


def with_device(call: CommandCall) -> CommandCall:
    """Return the call with the device that mergekit's flags mean. Errors: a wrong command line, if they contradict each other or
    ``--device``."""
    meant = {name: device for name, device in DEVICES.items() if call[name]}
    if not meant:
        return call
    device = "cuda:all" if "cuda:all" in meant.values() else "cuda"  # --cuda with --multi-gpu is usual
    if "device" in call.given:
        typed = str(call["device"])
        if typed != device and not (device == "cuda" and typed.startswith("cuda")):
            names = " and ".join(map(_typed, meant))
            raise click.BadParameter(
                f"{names} {'mean' if len(meant) > 1 else 'means'} --device {device}, and --device {typed} is given. Leave one out."
            )
        device = typed
    return CommandCall(call.command, {**call.values, "device": device}, {*call.given, "device"})


def _typed(name: str, value: object = True) -> str:
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
