"""Chooses the chat template of an output: the most common one, one known by name, or a text."""

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
from alnico.vocabulary.tokenizer import CONFIG, as_json, read_tokenizer_file

NAMES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
FILE, PROCESSOR_FILE = "chat_template.jinja", "chat_template.json"
MIN_LENGTH = 20


@dataclass(frozen=True)
class ChatTemplate:
    """Files to write for the output's chat template, none if the donor's stays.

    They take precedence over the files of a vocabulary.
    """

    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def check_setting(setting: str) -> str | None:
    """Return the template for a recipe's ``chat_template``; None for ``auto``. Reads no model.

    The value is one of :data:`NAMES`, or the template itself: a text of at least 20 characters with a ``{``.
    Errors: RecipeError.

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
    if len(setting) >= MIN_LENGTH and "{" in setting:
        return setting
    near = difflib.get_close_matches(setting, ("auto", *NAMES), 1, 0.5)
    raise RecipeError(
        f"chat_template: {setting[:80]!r} is not a known template; expected auto, {', '.join(NAMES)} or the "
        f"text of a Jinja template (at least {MIN_LENGTH} characters, with a '{{')."
        + (f" Did you mean {near[0]!r}?" if near else " Write one of them.")
    )


def plan_chat_template(
    setting: str, sources: Sequence[Source], donor: int, vocabulary: VocabularyPlan | None = None
) -> ChatTemplate:
    """Return the files to write for the chat template that the recipe requests.

    ``auto`` is the template that most of ``sources`` have, ignoring leading and trailing space; of equally
    common ones the first in recipe order. It is written where the output's tokenizer (the donor's, or that of
    ``vocabulary``) keeps its own: in ``chat_template.jinja``, or under the key of ``tokenizer_config.json``.
    The other place is cleared, and ``chat_template.json`` of a processor gets the same template.

    Errors: RecipeError for an invalid setting; ModelError for files that cannot be read.
    """
    template = check_setting(setting)
    notes: list[str] = []
    if template is None:
        templates = [(s.label, t) for s in sources if (t := template_of(s.directory)) is not None]
        if not templates:
            return ChatTemplate({}, ("chat_template: no model has a chat template; the output has none.",))
        counts = Counter(text.strip() for _, text in templates)
        template, votes = counts.most_common(1)[0]
        holders = [label for label, text in templates if text.strip() == template]
        template = next(text for _, text in templates if text.strip() == template)
        notes.append(
            f"the chat template is that of {holders[0]}, shared by {votes} of {len(sources)} models."
        )
    directory = sources[donor].directory

    def current_file(name: str) -> bytes | None:
        if vocabulary is not None and name in vocabulary.files:
            return vocabulary.files[name]
        if (
            directory is None
            or not (directory / name).exists()
            or (vocabulary is not None and name in vocabulary.excluded)
        ):
            return None
        return read_tokenizer_file(directory / name)

    files: dict[str, bytes] = {}
    config = current_file(CONFIG)
    settings = (
        parse_json(config, Path(CONFIG) if directory is None else directory / CONFIG)
        if config is not None
        else {}
    )
    in_config = "chat_template" in settings
    if in_config and current_file(FILE) is None:
        files[CONFIG] = as_json({**settings, "chat_template": template})
    else:
        files[FILE] = template.encode("utf-8")
        if in_config:
            files[CONFIG] = as_json({k: v for k, v in settings.items() if k != "chat_template"})
    processor = current_file(PROCESSOR_FILE)
    if processor is not None:
        files[PROCESSOR_FILE] = as_json(
            {**parse_json(processor, Path(directory or "") / PROCESSOR_FILE), "chat_template": template}
        )
    return ChatTemplate(files, tuple(notes))


def template_of(directory: Path | None) -> str | None:
    """Return a model's chat template: its file, or the (default) template in its tokenizer's settings."""
    if directory is None:
        return None
    if (directory / FILE).exists():
        return read_tokenizer_file(directory / FILE).decode("utf-8", "replace")
    for name in (CONFIG, PROCESSOR_FILE):
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
