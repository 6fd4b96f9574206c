"""Answers an unknown command with a merge of models, the nearest command, or what does it in alnico."""

from __future__ import annotations

import difflib
import os

from alnico.cli.sections import SECTIONS
from alnico.methods import registry
from alnico.methods.shared.other_words import OTHER_WORDS, find_word, plain_word, synonyms

LEAST_RATIO = 0.75
"""Similarity from which on a word is taken for a misspelling of a command or of a known word."""


def begins_a_merge(word: str) -> bool:
    """Is a word in place of a command the first model or the recipe of a merge?"""
    from alnico.cli import quick

    if quick.is_model(word) or word.endswith(quick.RECIPES):
        return True
    return find_word(word) is None and word not in registry() and (os.sep in word or "+" in word)


def command_of(word: str) -> str | None:
    """Return the command that a synonym names, or None.

    >>> command_of("weights"), command_of("norm-weights")
    ('norm-weights', None)
    """
    synonym = synonyms("command").get(word)
    return None if synonym is None else synonym.words[0]


def answer(word: str, prefix: str = "") -> str:
    """Return what to type in place of a word. ``prefix`` is the group of commands that it was looked for in.

    >>> answer("mrge"), answer("gui").partition(".")[0], answer("stroe")
    ("'mrge' is not a command. Did you mean merge?", "'gui' is not a command", "'stroe' is not a command. Did you mean store?")
    """
    begin = f"{prefix + word!r} is not a command."
    if (meant := _meaning(f"{prefix}{word}") or _meaning(word)) is not None:
        return f"{begin} {meant}"
    commands = {
        plain_word(n.removeprefix(prefix)): n
        for listed in SECTIONS.values()
        for n in listed
        if n.startswith(prefix)
    }
    commands |= {plain_word(n.split()[0]): n.split()[0] for n in commands.values() if not prefix and " " in n}
    others = (
        {}
        if prefix
        else {plain_word(w): w for w in (*registry(), *(w for e in OTHER_WORDS for w in e.words))}
    )
    near = difflib.get_close_matches(plain_word(word), commands, 1) or difflib.get_close_matches(
        plain_word(word), others, 1, LEAST_RATIO
    )
    if not near:
        return f"{begin} `alnico {prefix}--help` lists the commands."
    if near[0] in commands:
        return f"{begin} Did you mean {commands[near[0]]}?"
    return f"{begin} Did you mean {others[near[0]]}? {_meaning(others[near[0]])}"


def _meaning(word: str) -> str | None:
    """What does that a word names; None if nothing does."""
    known = find_word(word)
    if known is not None:
        return known.answer + (f" See {known.page}." if known.page else "")
    if word not in registry():
        return None
    return f"It is a merge method: alnico merge MODEL MODEL... OUT --method {word}. `alnico methods {word}` describes it."
