"""The chat template of an output: the one most models have, one that is known by name, or one that the recipe holds."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from alnico.checkpoint.json_files import parse_json, read_json
from alnico.checkpoint.source import Source
from alnico.errors import RecipeError
from alnico.vocabulary.output_vocabulary import VocabularyPlan
from alnico.vocabulary.tokenizer import CONFIG, as_json, read_bytes

NAMES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
FILE, OF_PROCESSOR = "chat_template.jinja", "chat_template.json"
SHORTEST = 20


@dataclass(frozen=True)
class ChatTemplate:
    """Files to write for the output's chat template, none if the donor's stays; they go before those of a vocabulary."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def check_setting(setting: str) -> str | None:
    """Return the template that a recipe's ``chat_template`` means; None for ``auto``. Reads no model.

    A name is one of :data:`NAMES`; a text of at least 20 characters with a ``{`` is a template itself. Errors: RecipeError.

    >>> check_setting("auto"), check_setting("{{ messages[0].content }}")
    (None, '{{ messages[0].content }}')
    """
    if setting == "auto":
        return None
    if setting in NAMES:
        return (
            resources.files("alnico.vocabulary")
            .joinpath("templates", f"{setting}.jinja")
            .read_text("utf-8")
            .rstrip("\n")
        )
    if len(setting) >= SHORTEST and "{" in setting:
        return setting
    near = difflib.get_close_matches(setting, ("auto", *NAMES), 1, 0.5)
    raise RecipeError(
        f"chat_template: {setting[:80]!r} is no known template; expected auto, {', '.join(NAMES)} or the text of a Jinja template "
        f"(at least {SHORTEST} characters, with a '{{')."
        + (f" Did you mean {near[0]!r}?" if near else " Write one of them.")
    )


def chat_template(
    setting: str, sources: Sequence[Source], donor: int, vocabulary: VocabularyPlan | None = None
) -> ChatTemplate:
    """Say which files hold the chat template that the recipe asks for.

    ``auto`` is the template that most of ``sources`` have, leading and trailing space apart, the first in recipe order among
    equally common ones. It is written where the output's tokenizer keeps its own: ``chat_template.jinja``, or the key of
    ``tokenizer_config.json``; the other place is cleared, and ``chat_template.json`` of a processor follows.
    The tokenizer is the donor's, or that of ``vocabulary``.

    Errors: RecipeError for a setting that is none; ModelError for files that cannot be read.
    """
    template = check_setting(setting)
    notes: list[str] = []
    if template is None:
        found = [(s.label, t) for s in sources if (t := template_of(s.directory)) is not None]
        if not found:
            return ChatTemplate({}, ("chat_template: no model has a chat template; the output has none.",))
        counts = Counter(text.strip() for _, text in found)
        template, votes = counts.most_common(1)[0]
        holders = [label for label, text in found if text.strip() == template]
        template = next(text for _, text in found if text.strip() == template)
        notes.append(
            f"the chat template is that of {holders[0]}, which {votes} of {len(sources)} models have."
        )
    directory = sources[donor].directory

    def held(name: str) -> bytes | None:
        if vocabulary is not None and name in vocabulary.files:
            return vocabulary.files[name]
        if (
            directory is None
            or not (directory / name).exists()
            or (vocabulary is not None and name in vocabulary.without)
        ):
            return None
        return read_bytes(directory / name)

    files: dict[str, bytes] = {}
    config = held(CONFIG)
    settings = (
        parse_json(config, Path(CONFIG) if directory is None else directory / CONFIG)
        if config is not None
        else {}
    )
    in_config = "chat_template" in settings
    if in_config and held(FILE) is None:
        files[CONFIG] = as_json({**settings, "chat_template": template})
    else:
        files[FILE] = template.encode("utf-8")
        if in_config:
            files[CONFIG] = as_json({k: v for k, v in settings.items() if k != "chat_template"})
    of_processor = held(OF_PROCESSOR)
    if of_processor is not None:
        files[OF_PROCESSOR] = as_json(
            {**parse_json(of_processor, Path(directory or "") / OF_PROCESSOR), "chat_template": template}
        )
    return ChatTemplate(files, tuple(notes))


def template_of(directory: Path | None) -> str | None:
    """The chat template of a model: its file, else the key of its tokenizer's settings (of several, the default)."""
    if directory is None:
        return None
    if (directory / FILE).exists():
        return read_bytes(directory / FILE).decode("utf-8", "replace")
    for name in (CONFIG, OF_PROCESSOR):
        value = read_json(directory / name).get("chat_template") if (directory / name).exists() else None
        if isinstance(value, list):
            named = {
                entry.get("name"): entry.get("template")
                for entry in value
                if isinstance(entry, dict) and entry.get("name") == "default"
            }
            value = named.get("default")
        if isinstance(value, str):
            return value
    return None
