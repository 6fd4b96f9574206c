"""Errors and the text in them: one line stays one line, whatever a name holds."""

from __future__ import annotations

import pickle
import unicodedata

import pytest

from alnico import errors
from alnico.errors import AlnicoError, RecipeError, UncheckedError, visible, without_secrets

HOSTILE = (
    "evil\x1b[2J\nalnico: merged\r\x07\x9b31m\x7f\u202e\u2066\u200b\u2028\u2029\ufeff\ud800\x85\x00\U000e0041"
)


@pytest.mark.parametrize("character", list(dict.fromkeys(HOSTILE[4:])), ids=lambda c: f"{ord(c):04x}")
def test_what_a_terminal_obeys_or_hides_is_escaped(character: str) -> None:
    is_plain = character.isascii() and character.isprintable()
    assert (visible(character) == character) == is_plain
    assert visible(character).isprintable()


def test_no_character_of_a_control_category_is_left() -> None:
    kept = [chr(c) for c in range(0x110000) if visible(chr(c)) == chr(c)]
    assert not {unicodedata.category(c) for c in kept} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def test_letters_that_nobody_sees_are_escaped() -> None:
    for character in ("\u3164", "\u115f", "\u2800", "\uffa0", "\u034f"):
        assert visible(f"a{character}b") == f"a\\u{ord(character):04x}b"


def test_what_people_write_stays_and_escaping_twice_changes_nothing() -> None:
    for text in ("Größe 模型 🤗 données/été", "C:\\models\\new", "a b\u00a0c\u3000d", "[red]x[/red]", ""):
        assert visible(text) == text
    assert visible(visible(HOSTILE)) == visible(HOSTILE)


@pytest.mark.parametrize(
    "kind", [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, AlnicoError)]
)
def test_an_error_has_the_lines_it_was_given_and_no_other(kind: type[AlnicoError]) -> None:
    error = kind(f"{HOSTILE}: first", f"second {HOSTILE}")
    assert len(str(error).split("\n")) == 2
    assert all(line.isprintable() for line in str(error).split("\n"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(kind(*error.args)) == str(error)


def test_the_reading_of_a_recipe_reports_a_line_for_each_mistake() -> None:
    from alnico.recipe.load import load_recipe

    with pytest.raises(RecipeError) as refused:
        load_recipe('merge_method: linear\nmodels: ["a", "b"]\n"k\\e[1m\\nx": 1\n"l\\n": 2\n')
    assert len(str(refused.value).split("\n")) == 2
    assert str(refused.value).replace("\n", "").isprintable()


def test_what_was_found_goes_with_an_unchecked_error() -> None:
    assert UncheckedError("a", "b", result=3).result == 3
    assert pickle.loads(pickle.dumps(UncheckedError("a", result=3))).result == 3


def test_the_middle_of_a_word_of_thousands_of_characters_is_left_out() -> None:
    path = "/start/" + "x" * 4000 + "/end"
    said = str(AlnicoError(f"{path}: is no directory; expected one. Check the path {path}."))
    assert len(said) < 900
    assert said.startswith("/start/x")
    assert "x/end: is no directory" in said
    assert str(AlnicoError("short " * 1000)) == "short " * 1000


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:s3cr3t@bucket/model",
        "s3://key:sl/s3cr3t@bucket/model",
        "https://s3cr3t@example.org/model",
        "s3:/key:s3cr3t@bucket/model",
        "s3:key:s3cr3t@bucket/model",
        "https://example.org/model?X-Amz-Signature=s3cr3t",
        "base+0.5*s3://key:s3cr3t@bucket/model",
    ],
)
def test_no_error_shows_a_password_in_a_url(url: str) -> None:
    for line in (f"{url}: is not there.", f"model: a+{url}", f"{url!r} is not a number, but {url}.json is"):
        assert "s3cr3t" not in str(AlnicoError(line))
        assert without_secrets(without_secrets(line)) == without_secrets(line)


@pytest.mark.parametrize(
    "text",
    [
        "see https://example.org/a/b.html#c, and run again?",
        "did you mean s3://bucket/base+org/adapter@main?",
        "http://localhost:8080/model: is not there",
        "--ray 10.0.0.1:6379, ray://head:10001 or auto; ask me@example.org",
        "C:\\models\\a@b: c/d@e",
        "store:sql@2 and store:sql:0.7 of me@example.org",
    ],
)
def test_other_text_with_such_characters_is_shown(text: str) -> None:
    assert str(AlnicoError(text)) == text
