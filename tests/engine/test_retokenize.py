"""A model gets the vocabulary of another: known rows are copied, others made, and everything else belongs together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import AlnicoError, MismatchError, NonFiniteError, RecipeError
from alnico.vocabulary.token_texts import byte_characters
from made import llama_config, llama_shapes, read_file, save_model
from made_pursuit import plain_pursuit
from made_tokenizers import EMBED, HEAD, entry, save_tokenizer

Run = Callable[..., tuple[int, str, str]]
BYTES = {value: character for character, value in byte_characters().items()}
LETTERS = "abcdefghijklmnop"

OWN = ["<|start|>", "<|end|>", *LETTERS, " ", "ab", "cd", " a", "é"]
"""The model's tokens: a byte-level BPE."""
OWN_MERGES = [["a", "b"], ["c", "d"], ["Ġ", "a"], ["Ã", "©"]]
NEW = [
    "<pad>",
    "<eos>",
    "<bos>",
    "ab",
    *reversed(LETTERS),
    "▁",
    "▁a",
    "é",
    "abc",
    "▁ab",
    "cdab",
    "日",
    "<mark>",
    "fab",
]
"""The donor's tokens: pieces of SentencePiece. The last six have no row in the model."""
ROWS = len(NEW) + 2
TEMPLATE = "{% for m in messages %}<mark>{{ m.content }}{% endfor %}"
WIDTHS = {"model": 16, "donor": 24}

ROLES = {"<eos>": "<|end|>", "<bos>": "<|start|>", "<pad>": "<|end|>"}
KNOWN = {
    t: OWN.index(ROLES.get(t, t.replace("▁", " "))) for t in NEW if ROLES.get(t, t.replace("▁", " ")) in OWN
}
MADE = [t for t in NEW if t not in KNOWN]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def level(text: str) -> str:
    return "".join(BYTES[b] for b in text.encode())


def save(name: str, rows: int, seed: int, *, tied: bool = True, dtype: str = "BF16", **config: Any) -> None:
    random = np.random.default_rng(seed)
    shape = {
        "hidden": WIDTHS["donor" if name.startswith("donor") else "model"],
        "vocabulary": rows,
        "tied": tied,
    }
    tensors = {
        n: (dtype, random.standard_normal(s).astype(np.float32)) for n, s in llama_shapes(**shape).items()
    }
    save_model(Path(name), tensors, {**llama_config(**shape), **config})


def save_models(tied: bool = True, donor_tied: bool = True, dtype: str = "BF16") -> None:
    save("model", len(OWN), 1, tied=tied, dtype=dtype, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    marks = [entry(t, i) for i, t in enumerate(OWN[:2])]
    vocabulary = {t if i < 2 else level(t): i for i, t in enumerate(OWN)}
    save_tokenizer(
        Path("model"), vocabulary, marks, {"merges": OWN_MERGES},
        bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>", chat_template="the model's own template",
    )  # fmt: skip
    document = json.loads(Path("model/tokenizer.json").read_text())
    document["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    Path("model/tokenizer.json").write_text(json.dumps(document))
    Path("model/generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.5}')
    Path("model/vocab.json").write_text("{}")
    save("donor", ROWS, 2, tied=donor_tied, bos_token_id=2, eos_token_id=[1, 27], pad_token_id=0)
    save_pieces("donor")
    Path("donor/generation_config.json").write_text(
        '{"eos_token_id": [1, 27], "pad_token_id": 0, "top_k": 5}'
    )


def save_pieces(folder: str) -> None:
    marks = [entry(t, NEW.index(t)) for t in ("<pad>", "<eos>", "<bos>", "<mark>")]
    save_tokenizer(
        Path(folder), {t: i for i, t in enumerate(NEW)}, marks, {"byte_fallback": True},
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
    )  # fmt: skip
    (Path(folder) / "chat_template.jinja").write_text(TEMPLATE)


def stored(folder: str) -> dict[str, np.ndarray]:
    return {
        name: values
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, (_, values) in read_file(file).items()
    }


def raw(folder: str) -> dict[str, tuple[str, bytes]]:
    return {
        name: (dtype, values.tobytes())
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, (dtype, values) in read_file(file).items()
    }


def of(folder: str, file: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / file).read_text())
    return found


def expected_rows(own: np.ndarray, donor: np.ndarray, atoms: int) -> np.ndarray:
    """The output's table by the plain algorithm: made rows in float64."""
    shared = [t for t in NEW if t in KNOWN]
    of_donor = donor[[NEW.index(t) for t in shared]].astype(np.float64)
    of_own = own[[KNOWN[t] for t in shared]].astype(np.float64)
    rows = np.tile(own.astype(np.float64).mean(axis=0), (ROWS, 1))
    for i, token in enumerate(NEW):
        rows[i] = (
            own[KNOWN[token]]
            if token in KNOWN
            else plain_pursuit(donor[i].astype(np.float64), of_donor, atoms) @ of_own
        )
    return rows


def is_near(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.allclose(found, expected, rtol=2.0**-8, atol=2.0**-10))  # bfloat16


def test_known_rows_are_copied_and_others_are_made_by_matching_pursuit() -> None:
    save_models()
    result = alnico.retokenize("model", "donor", "out", atoms=5)
    own, donor, out = stored("model"), stored("donor"), stored("out")
    assert list(out) == list(own)
    assert out[EMBED].shape == (ROWS, WIDTHS["model"])
    for token, row in KNOWN.items():
        assert out[EMBED][NEW.index(token)].tobytes() == own[EMBED][row].tobytes(), token
    assert is_near(out[EMBED], expected_rows(own[EMBED], donor[EMBED], 5))
    others = {name: data for name, data in raw("model").items() if name != EMBED}
    assert {name: data for name, data in raw("out").items() if name != EMBED} == others
    assert raw("out")[EMBED][0] == "BF16"
    notes = (*result.plan.notes, *result.notes)
    assert f"the output has {len(NEW)} tokens in {ROWS} rows: the tokenizer of donor." in notes
    assert (
        f"model knows {len(KNOWN)} of the {len(NEW)} tokens, 3 of them by their role; {len(MADE)} rows are made of up to 5 of its rows by "
        "orthogonal matching pursuit."
    ) in notes
    assert "2 rows of no token are the mean of all rows." in notes
    (rebuilt,) = result.rebuilt
    assert (rebuilt.tensor, rebuilt.known, rebuilt.made, rebuilt.sampled) == (
        EMBED,
        len(KNOWN),
        len(MADE),
        len(KNOWN),
    )


def test_known_rows_are_rebuilt_without_themselves() -> None:
    save_models()
    (rebuilt,) = alnico.retokenize("model", "donor", "out", atoms=3).rebuilt
    own, donor = stored("model")[EMBED].astype(np.float64), stored("donor")[EMBED].astype(np.float64)
    shared = [t for t in NEW if t in KNOWN]
    atoms, rows = donor[[NEW.index(t) for t in shared]], own[[KNOWN[t] for t in shared]]
    made = np.stack([plain_pursuit(atom, atoms, 3, without=i) for i, atom in enumerate(atoms)]) @ rows
    lengths = np.linalg.norm(rows, axis=1)
    assert np.isclose(rebuilt.error, (np.linalg.norm(made - rows, axis=1) / lengths).mean())
    cosines = (made * rows).sum(axis=1) / lengths / np.linalg.norm(made, axis=1)
    assert np.isclose(rebuilt.cosine, cosines.mean())


def test_tokenizer_template_and_ids_are_the_donors() -> None:
    save_models()
    alnico.retokenize("model", "donor", "out", atoms=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert Path("out", name).read_bytes() == Path("donor", name).read_bytes()
    assert not Path("out/vocab.json").exists()
    config = {
        **of("model"),
        "vocab_size": ROWS,
        "bos_token_id": 2,
        "eos_token_id": [1, 27],
        "pad_token_id": 0,
    }
    assert of("out") == config
    generation = {"eos_token_id": [1, 27], "temperature": 0.5, "bos_token_id": 2, "pad_token_id": 0}
    assert of("out", "generation_config.json") == generation


@pytest.mark.parametrize(("tied", "donor_tied"), [(False, False), (False, True), (True, False)])
def test_a_head_is_made_by_the_donors_head_and_stays_tied_or_not(tied: bool, donor_tied: bool) -> None:
    save_models(tied, donor_tied)
    result = alnico.retokenize("model", "donor", "out", atoms=4)
    own, donor, out = stored("model"), stored("donor"), stored("out")
    assert list(out) == list(own)
    assert of("out")["tie_word_embeddings"] is tied
    assert is_near(out[EMBED], expected_rows(own[EMBED], donor[EMBED], 4))
    if not tied:
        assert is_near(out[HEAD], expected_rows(own[HEAD], donor[EMBED if donor_tied else HEAD], 4))
    assert [rows.tensor for rows in result.rebuilt] == [EMBED] if tied else [EMBED, HEAD]


def test_sub_words_are_averaged() -> None:
    save_models()
    result = alnico.retokenize("model", "donor", "out", approximate="subword")
    own, out = stored("model")[EMBED].astype(np.float64), stored("out")[EMBED]
    divided = {"abc": ["ab", "c"], "▁ab": [" ", "ab"], "cdab": ["cd", "ab"], "fab": ["f", "ab"], "<mark>": ["m", "a", "k"]}  # fmt: skip
    for token, pieces in divided.items():
        mean = own[[OWN.index(p) for p in pieces]].mean(axis=0)
        assert is_near(out[NEW.index(token)], mean), token
    assert is_near(out[NEW.index("日")], own.mean(axis=0))  # no byte of it has a row
    assert f"{len(MADE)} rows are the mean of the rows of sub-words." in " ".join(result.plan.notes)


def test_without_a_way_to_tell_tokens_apart_rows_are_the_mean() -> None:
    save_models()
    alnico.retokenize("model", "donor", "out", approximate="mean")
    own, out = stored("model")[EMBED].astype(np.float64), stored("out")[EMBED]
    for token in MADE:
        assert is_near(out[NEW.index(token)], own.mean(axis=0))


def test_threads_budget_and_batches_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from alnico.vocabulary import made_rows

    save_models(tied=False)
    alnico.retokenize("model", "donor", "out", atoms=4, threads=1)
    expected = raw("out")
    alnico.retokenize("model", "donor", "threads", atoms=4, threads=3, memory="5GiB")
    monkeypatch.setattr(made_rows, "MOST_TARGETS", 1)
    monkeypatch.setattr(made_rows, "LEAST_TARGETS", 1)
    monkeypatch.setattr(made_rows, "BLOCK_ATOMS", 3)
    monkeypatch.setattr(made_rows, "RESIDENT_PARTS", 1 << 40)
    alnico.retokenize("model", "donor", "blocks", atoms=4, threads=2)
    assert raw("threads") == raw("blocks") == expected


def test_the_output_is_verified_and_made_again() -> None:
    save_models()
    alnico.retokenize("model", "donor", "out", atoms=3)
    assert alnico.verify("out", against_inputs=True).unchecked == ()
    assert alnico.reproduce("out").tensors == len(stored("out"))
    lock = of("out", "alnico.lock.json")
    assert lock["recipe"]["tokenizer"] == {"source": "donor", "approximate": "omp", "atoms": 3}
    assert (
        alnico.merge("out/mergekit_config.yml", "again").digests
        == alnico.merge(lock["recipe"], "more").digests
    )
    card = Path("out/README.md").read_text()
    assert "| donor | not from the hub | tokens |" in card


def test_a_tokenizer_alone_is_enough_for_sub_words_and_the_mean() -> None:
    save_models()
    save_pieces("words")
    alnico.retokenize("model", "donor", "with", approximate="subword")
    alnico.retokenize("model", "words", "alone", approximate="subword")
    rows = len(NEW)  # a tokenizer alone states no further rows
    assert (stored("alone")[EMBED] == stored("with")[EMBED][:rows]).all()
    assert of("alone")["eos_token_id"] == NEW.index("<eos>")
    assert alnico.verify("alone", against_inputs=True).unchecked == ()
    with pytest.raises(MismatchError) as caught:
        alnico.retokenize("model", "words", "out")
    assert str(caught.value) == (
        "words: has a tokenizer and no embeddings (no matrix with a row for each token); expected some, since omp finds there how rows are "
        "made. Give a model with its weights, or choose approximate: subword or mean."
    )
    assert not Path("out").exists()


def test_merges_across_vocabularies_make_rows_in_each_model() -> None:
    save_models()
    alnico.retokenize("model", "donor", "out", atoms=4)
    save("tuned", len(OWN), 1, bos_token_id=0, eos_token_id=1)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        Path("tuned", file).write_bytes(Path("model", file).read_bytes())
    recipe = {
        "merge_method": "linear",
        "models": ["model", "tuned"],
        "tokenizer": {"source": "donor", "approximate": "omp", "atoms": 4},
    }
    result = alnico.merge(recipe, "merged")
    assert (stored("merged")[EMBED] == stored("out")[EMBED]).all()  # equal models
    assert len(result.rebuilt) == 2
    # The model that gives the tokenizer may be merged, too.
    save_models_of_one_width()
    recipe["models"] = ["model", "donor"]
    merged = alnico.merge({**recipe, "unrelated": "allow"}, "both")
    own = (stored("narrow")[EMBED].astype(np.float64) + stored("donor")[EMBED]) / 2
    both = stored("both")[EMBED][: len(NEW)]
    assert np.allclose(both, own[: len(NEW)], rtol=2.0**-8, atol=2.0**-7)  # narrow is rounded before
    assert [rows.model for rows in merged.rebuilt] == ["model"]


def save_models_of_one_width() -> None:
    """Write the donor as wide as the model, and the model with its tokens."""
    save("model-wide", ROWS, 7, bos_token_id=2, eos_token_id=1)
    for file in Path("model-wide").iterdir():
        (Path("donor") / file.name).write_bytes(file.read_bytes())
    alnico.retokenize("model", "donor", "narrow", atoms=4)


BAD: Mapping[str, tuple[dict[str, Any], type[AlnicoError], str]] = {
    "way": ({"approximate": "ompp"}, AlnicoError, "approximate is 'ompp'; expected omp, subword or mean. Did you mean omp?"),
    "atoms": ({"atoms": 0}, AlnicoError, "atoms is 0; expected a whole number of 1 or more."),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_option_is_refused_before_anything_is_read(case: str) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error) as caught:
        alnico.retokenize("model", "donor", "out", **options)
    assert str(caught.value) == message


WRONG = {
    "{source: donor, approximate: ompp}": "recipe:1: tokenizer.approximate is 'ompp'; expected omp, subword or mean. Did you mean omp?",
    "{source: union, approximate: omp}": "recipe:1: tokenizer.approximate is omp, and the source is union; expected base or a model, whose "
    "tokens the output has. Write tokenizer: {source: MODEL, approximate: omp}.",
    "{source: donor, approximate: mean, atoms: 3}": "recipe:1: tokenizer.atoms is given without approximate: omp, which alone uses it; "
    "expected both. Remove atoms, or add approximate: omp.",
    "{source: donor, approximate: omp, atoms: 0}": "recipe:1: tokenizer.atoms is 0; expected a whole number of at least 1.",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_of_a_recipe_is_refused(setting: str) -> None:
    from alnico.recipe.load import parse_recipe

    text = f"{{merge_method: passthrough, models: [model], tokenizer: {setting}}}"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe")
    assert str(caught.value) == WRONG[setting]


def test_a_donor_with_a_number_that_is_none_is_refused() -> None:
    save_models()
    tensors = {n: ("BF16", v.astype(np.float32)) for n, v in stored("donor").items()}
    tensors[EMBED][1][NEW.index("c"), 3] = np.nan
    save_model(Path("donor"), tensors)
    with pytest.raises(NonFiniteError, match=rf"donor: {EMBED}\[{NEW.index('c')}, 3\] is not finite"):
        alnico.retokenize("model", "donor", "out")


def test_models_without_a_common_token_are_refused() -> None:
    save_models()
    save_tokenizer(Path("donor"), {f"x{i}": i for i in range(9)})
    with pytest.raises(MismatchError, match="donor: shares no token with the model"):
        alnico.retokenize("model", "donor", "out")
    result = alnico.retokenize("model", "donor", "out", approximate="mean")
    assert (
        "model and donor share hardly any token, so the output will not work as model does."
        in result.plan.notes
    )


def test_the_command_takes_the_flags_of_mergekit_tokensurgeon(run: Run) -> None:
    save_models()
    code, out, _ = run("retokenize", "model", "out", "--tokenizer", "donor", "-k", "4")
    assert code == 0
    assert out.startswith("out: ")
    more = ["-a", "omp", "--batch-size", "128", "-bm", "yes", "-pm", "no", "-s", "mean", "--no-magikarp"]
    code, _, err = run("retokenize", "model", "flags", "--tokenizer", "donor", "--k", "4", *more)
    assert code == 0, err
    assert "note: --batch-size has no effect: --memory decides how many rows are made at a time." in err
    assert raw("flags") == raw("out")
    code, found, _ = run(
        "retokenize", "model", "json", "--tokenizer", "donor", "--approximation-method", "mean", "--json"
    )
    assert code == 0
    assert json.loads(found)["rebuilt"][0]["made"] == len(MADE)


REFUSED = {
    ("--approximation-method", "landmark_pca"): "--approximation-method is 'landmark_pca', a way of mergekit-tokensurgeon that alnico does "
    "not have; expected omp, subword or mean. Choose one of them.",
    ("-pm", "yes"): "--prefix-match: a token does not get the row of its beginning. Leave the option out, or take --approximate subword.",
    ("--subword-method", "sum"): "--subword-method: the rows of sub-words are averaged. Leave the option out.",
    ("--magikarp",): "--magikarp: no token is left out as untrained. Leave the option out.",
    ("-nvs", "0.5"): "--new-vocab-scale: new rows are not scaled. Leave the option out.",
    ("--k", "3", "--atoms", "4"): "--k is --atoms, and both are given with different values. Leave one out.",
}  # fmt: skip


@pytest.mark.parametrize("flags", REFUSED)
def test_what_mergekit_tokensurgeon_does_and_alnico_does_not_is_refused(
    run: Run, flags: tuple[str, ...]
) -> None:
    code, _, err = run("retokenize", "model", "out", "--tokenizer", "donor", *flags)
    assert code == 2
    assert REFUSED[flags] in " ".join(err.split())
