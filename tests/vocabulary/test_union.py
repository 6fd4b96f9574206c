"""The vocabulary of an output: its tokens and ids as the tokenizers library gives them, its files, its configs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import Model
from alnico.errors import MismatchError, ModelError, RecipeError
from alnico.recipe.schema import TokenizerSetting, TokenSource
from alnico.vocabulary.output_vocabulary import VocabularyPlan, plan_vocabulary
from alnico.vocabulary.remapped_model import remap_rows
from alnico.vocabulary.row_map import PADDING, ZEROS
from alnico.vocabulary.tokenizer import assign_added_ids, read_tokenizer
from made_tokenizers import (
    CASES,
    EMBED,
    entry,
    letters,
    matrix,
    planned,
    save_family,
    save_matrices,
    save_tokenizer,
    special,
)

UNION = TokenizerSetting()
TEXT = "abcd efgh bad cab hedge"


def plan_of(sources: Sequence[Model], setting: TokenizerSetting = UNION, **keys: Any) -> VocabularyPlan:
    names = [s.location.name for s in sources]
    return plan_vocabulary(setting, sources, names, 0, range(len(sources)), **keys)


def written(plan: VocabularyPlan, folder: Path) -> Library:
    """Write the planned files and load them with the library."""
    folder.mkdir()
    for name, data in plan.files.items():
        (folder / name).write_bytes(data)
    return Library.from_file(str(folder / "tokenizer.json"))


def opened(folder: Path, number: int, rows: int, **keys: Any) -> Model:
    return open_model(save_matrices(folder, number, rows, **keys))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {
        name: open_model(folder) for name, folder in save_family(tmp_path_factory.mktemp("family")).items()
    }


@pytest.mark.parametrize("seed", range(40))
def test_added_tokens_get_the_ids_that_the_library_gives(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    ids = draw.sample(range(12), draw.randint(1, 9))
    vocabulary = {f"t{i}": i for i in sorted(ids)}
    names = draw.sample([*vocabulary, *(f"<{i}>" for i in range(6))], draw.randint(0, 6))
    added = [entry(name, draw.randint(0, 20)) for name in names]
    path = save_tokenizer(tmp_path, vocabulary, added) / "tokenizer.json"
    found = {**vocabulary, **{t: e["id"] for t, e in assign_added_ids(vocabulary, added).items()}}
    assert found == Library.from_file(str(path)).get_vocab(with_added_tokens=True)
    read = read_tokenizer(tmp_path)
    assert read is not None
    assert read.tokens == found


@pytest.mark.parametrize("case", CASES)
def test_the_written_tokenizer_has_the_rows_that_are_planned(
    case: str, family: dict[str, Model], tmp_path: Path
) -> None:
    sources = [family[n] for n in CASES[case]["models"]]
    plan = planned(CASES[case], sources)
    library = written(plan, tmp_path / "out")
    ids = library.get_vocab(with_added_tokens=True)
    assert len(set(ids.values())) == len(ids)
    assert max(ids.values()) < plan.size
    donor = CASES[case]["models"].index(CASES[case].get("base_model", CASES[case]["models"][0]))
    forced = CASES[case]["tokenizer"].get("tokens", {})
    parent = read_tokenizer(sources[donor].directory)
    assert parent is not None
    out = matrix(remap_rows(sources[donor], sources, (EMBED,), plan.rows[donor]), EMBED)
    own = matrix(sources[donor], EMBED)
    for token, row in parent.tokens.items():
        if token in ids and token not in forced and row < len(own):
            np.testing.assert_array_equal(out[ids[token]], own[row])


def test_a_union_encodes_text_as_the_base_and_the_added_tokens_of_others_as_one(
    family: dict[str, Model], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    plan = planned(CASES["union"], [family[n] for n in CASES["union"]["models"]])
    written(plan, tmp_path / "out")
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    base, chat = (AutoTokenizer.from_pretrained(family[n].location) for n in ("base", "chat"))
    text = f"<s>{TEXT}</s>"
    assert out.encode(text) == base.encode(text)
    talk = f"<|im_start|>{TEXT}<|im_end|>"
    assert out.convert_ids_to_tokens(out.encode(talk)) == chat.convert_ids_to_tokens(chat.encode(talk))
    assert (len(out), out.bos_token, out.eos_token) == (16, "<s>", "</s>")
    assert out.all_special_tokens == base.all_special_tokens
    (chat_plan,) = [planned(CASES["model"], [family[n] for n in CASES["model"]["models"]])]
    written(chat_plan, tmp_path / "chat")
    assert AutoTokenizer.from_pretrained(tmp_path / "chat").encode(talk) == chat.encode(talk)


@pytest.mark.parametrize("case", ["base", "model", "pad", "model-token"])
def test_the_files_are_a_models_byte_for_byte_where_no_token_is_added(
    case: str, family: dict[str, Model]
) -> None:
    names = CASES[case]["models"]
    plan = planned(CASES[case], [family[n] for n in names])
    template = "chat" if case == "model" else names[0]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert plan.files[name] == (family[template].location / name).read_bytes()
    assert set(plan.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert {"chat_template.jinja", "vocab.json"} <= plan.excluded
    assert not plan.excluded & set(plan.files)


def test_ids_come_in_recipe_order_and_the_first_description_of_a_token_counts(tmp_path: Path) -> None:
    sources = []
    for number, (name, tokens, added) in enumerate(
        [("a", "ab", ["<x>"]), ("b", "cab", ["<y>", "<x>", "d"]), ("c", "edc", ["<y>"])]
    ):
        vocabulary = {t: i for i, t in enumerate(tokens)}
        entries = [
            entry(t, len(tokens) + i, special=name == "a", lstrip=name == "b", rstrip=name == "c")
            for i, t in enumerate(added)
        ]
        save_tokenizer(tmp_path / name, vocabulary, entries)
        sources.append(opened(tmp_path / name, number, len(tokens) + len(added)))
    plan = plan_of(sources)
    vocabulary = written(plan, tmp_path / "out").get_vocab(with_added_tokens=True)
    assert vocabulary == {"a": 0, "b": 1, "<x>": 2, "c": 3, "e": 4, "<y>": 5, "d": 6}
    entries = {e["content"]: e for e in json.loads(plan.files["tokenizer.json"])["added_tokens"]}
    assert (entries["<x>"]["special"], entries["<y>"]["lstrip"], entries["d"]["lstrip"]) == (True, True, True)
    assert not entries["<y>"]["rstrip"]
    assert (entries["c"]["normalized"], entries["c"]["special"]) == (True, False)
    assert plan.files == plan_of(sources).files


def test_gaps_in_a_vocabulary_are_rows_of_padding_and_no_two_tokens_share_a_row(tmp_path: Path) -> None:
    gapped = {"[UNK]": 0, "a": 1, "b": 4, "##c": 6}
    word = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 9,
    }
    save_tokenizer(tmp_path / "a", gapped, [], {**word, "merges": None})
    save_tokenizer(tmp_path / "b", {"[UNK]": 0, "a": 1, "new": 2}, [], {**word, "merges": None})
    sources = [opened(tmp_path / "a", 0, 7), opened(tmp_path / "b", 1, 3)]
    base = plan_of(sources, TokenizerSetting("base"))
    assert base.size == 7  # mergekit: 4, and an index out of range
    assert np.flatnonzero(base.rows[0].origin == PADDING).tolist() == [2, 3, 5]
    assert base.dropped[0].rows == 3
    union = plan_of(sources)
    ids = written(union, tmp_path / "out").get_vocab(with_added_tokens=True)
    assert {t: ids[t] for t in (*gapped, "new")} == {**gapped, "new": 7}
    assert union.size == 8
    assert union.rows[0].origin.tolist() == [0, 0, PADDING, PADDING, 0, PADDING, 0, 1]
    out = matrix(remap_rows(sources[0], sources, (EMBED,), union.rows[0]), EMBED)
    np.testing.assert_allclose(
        out[2], (np.array([0, 1, 4, 6, 1002]).mean(), np.array([0, 7, 28, 42, 15]).mean()), rtol=1e-7
    )


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
def test_tokens_without_a_row_are_taken_out_of_the_template(tmp_path: Path, kind: str) -> None:
    names = ["<unk>", "a", "b", "ab", "ba"]
    models: dict[str, dict[str, Any]] = {
        "BPE": {"merges": [["a", "b"], "b a"]},
        "WordPiece": {
            "type": "WordPiece",
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 9,
        },
        "Unigram": {
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": False,
            "vocab": [[t, -float(i)] for i, t in enumerate(names)],
        },
    }
    model = models[kind]
    if kind == "BPE":
        model["merges"] = [["a", "b"], ["b", "a"]]
    processor = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<end>": {"id": "<end>", "ids": [6], "tokens": ["<end>"]}},
    }  # fmt: skip
    folder = save_tokenizer(
        tmp_path / "a",
        {t: i for i, t in enumerate(names)},
        [entry("<x>", 5), entry("<end>", 6)],
        model,
        eos_token="<end>",
    )
    document = json.loads((folder / "tokenizer.json").read_text())
    padding = {
        "strategy": {"Fixed": 4},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 6,
        "pad_type_id": 0,
        "pad_token": "<end>",
    }
    (folder / "tokenizer.json").write_text(
        json.dumps({**document, "post_processor": processor, "padding": padding})
    )
    (folder / "vocab.json").write_text("{}")
    source = opened(folder, 0, 4)
    plan = plan_of([source], TokenizerSetting("base"))
    library = written(plan, tmp_path / "out")
    assert library.get_vocab(with_added_tokens=True) == {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "<end>": 4}
    ids = library.encode("ab").ids  # the post-processor and the padding follow the token that they name
    assert (ids[0], ids[-1]) == (4, 4)
    assert plan.size == 5
    assert "vocab.json" in plan.excluded  # it says otherwise
    assert f"the tokenizer of {source.label} loses 2 tokens without a row in the model." in plan.notes
    assert "1 tokens have no row in any model and start as zeros: '<end>'." in plan.notes


def test_a_vocabulary_beside_tokenizer_json_stays_where_it_says_the_same(
    family: dict[str, Model], tmp_path: Path
) -> None:
    vocabulary, model = letters(pairs=("ab", "cd"))
    folder = save_tokenizer(tmp_path / "a", vocabulary, special(), model, eos_token="</s>")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "added_tokens.json").write_text("{}")
    plan = plan_of([opened(folder, 0, 14), family["chat"]])
    assert plan.files["vocab.json"] == (folder / "vocab.json").read_bytes()
    assert json.loads(plan.files["added_tokens.json"]) == {"<|im_start|>": 14, "<|im_end|>": 15}
    decoder = json.loads(plan.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {i: e["content"] for i, e in decoder.items()} == {
        "0": "<unk>", "1": "<s>", "2": "</s>", "14": "<|im_start|>", "15": "<|im_end|>",
    }  # fmt: skip
    assert decoder["14"] == {k: v for k, v in entry("<|im_start|>", 0).items() if k != "id"}


def piece(text: str) -> bytes:
    data = text.encode()
    return bytes([0x0A, len(data) + 2, 0x0A, len(data)]) + data


def test_a_sentencepiece_model_gets_tokens_beside_it(family: dict[str, Model], tmp_path: Path) -> None:
    source = opened(tmp_path / "a", 7, 5)
    (tmp_path / "a" / "tokenizer.model").write_bytes(
        b"".join(map(piece, ["<unk>", "<s>", "</s>", "▁a", "a"]))
    )
    (tmp_path / "a" / "added_tokens.json").write_text('{"<pad>": 5}')
    (tmp_path / "a" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>"}'
    )
    plan = plan_of([source, family["chat"]])
    assert plan.files["tokenizer.model"] == (tmp_path / "a" / "tokenizer.model").read_bytes()
    settings = json.loads(plan.files["tokenizer_config.json"])["added_tokens_decoder"]
    found = {e["content"]: int(i) for i, e in settings.items()}
    plain = [*"bcdefgh", " ", "ab", "cd"]
    assert found == {
        "<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 5, **{t: 6 + i for i, t in enumerate(plain)}, "<|im_start|>": 16, "<|im_end|>": 17,
    }  # fmt: skip
    assert plan.size == 18
    fewer = plan_of([opened(tmp_path / "a", 7, 4), family["chat"]], TokenizerSetting("base"))
    assert (fewer.size, fewer.rows[0].origin.tolist()) == (
        6,
        [0, 0, 0, 0, 1, ZEROS],
    )  # its file cannot be cut
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(
        ModelError, match="the ids of a XLMRobertaTokenizer are not the positions of its pieces"
    ):
        plan_of([source, family["chat"]])


def test_the_number_of_rows_stands_where_the_config_has_it(family: dict[str, Model], tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "a", {"<s>": 0, "a": 1}, [])
    source = opened(
        folder, 0, 2, text_config={"vocab_size": 2, "bos_token_id": 0}, vision_config={"vocab_size": 99}
    )
    assert plan_of([source, family["base"]], TokenizerSetting("base")).config == {}
    plan = plan_of([source, family["base"]], TokenizerSetting("union", pad_to_multiple_of=64))
    assert plan.config == {"vocab_size": 64, "text_config": {"vocab_size": 64, "bos_token_id": 0}}


def test_token_ids_of_the_configs_follow_their_tokens_into_another_tokenizer(
    family: dict[str, Model], tmp_path: Path
) -> None:
    tokens = ["<pad>", "</s>", "<s>", *"ab", "<image>"]
    folder = save_tokenizer(tmp_path / "a", {t: i for i, t in enumerate(tokens)}, [], eos_token="</s>")
    config = {
        "bos_token_id": 2,
        "eos_token_id": [1, 4],
        "pad_token_id": 0,
        "image_token_index": 5,
        "sep_token_id": None,
    }
    source = opened(
        folder,
        0,
        6,
        **config,
        text_config={"vocab_size": 6, "bos_token_id": 2},
        vision_config={"vocab_size": 99},
    )
    generation = {
        "bos_token_id": 2,
        "pad_token_id": -1,
        "suppress_tokens": [0, 3],
        "bad_words_ids": [[3, 4]],
        "top_k": 3,
        "x_token_id": 77,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    plan = plan_vocabulary(TokenizerSetting("chat"), [source, family["chat"]], ["a", "chat"], 0, [0, 1])
    assert plan.config == {
        "vocab_size": 16, "bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": None, "image_token_index": None,
        "text_config": {"vocab_size": 16, "bos_token_id": 1},
    }  # fmt: skip
    assert json.loads(plan.files["generation_config.json"]) == {
        "bos_token_id": 1, "pad_token_id": -1, "suppress_tokens": [3], "bad_words_ids": [[3, 4]], "top_k": 3, "x_token_id": 77,
    }  # fmt: skip
    assert "pad_token_id: '<pad>' is not in the output; it is removed." in plan.notes
    assert not any("_id: -1 is" in note for note in plan.notes)
    assert f"x_token_id: 77 is not a token of {source.label}; it stays as it is." in plan.notes


def test_a_role_that_the_donors_token_cannot_have_goes_to_the_token_that_has_it(
    family: dict[str, Model], tmp_path: Path
) -> None:
    folder = save_tokenizer(tmp_path / "a", {"a": 0, "<eot>": 1}, [], eos_token="<eot>")
    source = opened(folder, 0, 2, eos_token_id=[1, 1], bos_token_id=1)
    plan = plan_vocabulary(TokenizerSetting("chat"), [source, family["chat"]], ["a", "chat"], 0, [0, 1])
    assert (plan.config["eos_token_id"], plan.config.get("bos_token_id", 1)) == ([2], 1)
    assert "eos_token_id: '<eot>' is not in the output; '</s>' replaces it." in plan.notes


def test_an_id_that_no_tokenizer_says_comes_from_the_config_beside_the_tokenizer_that_is_taken(
    tmp_path: Path,
) -> None:
    one = opened(
        save_tokenizer(tmp_path / "a", {"a": 0, "<start>": 1}, []),
        0,
        2,
        decoder_start_token_id=1,
        eos_token_id=1,
    )
    folder = save_tokenizer(tmp_path / "b", {"<go>": 0, "b": 1, "<end>": 2}, [])
    other = opened(folder, 1, 3)
    (folder / "config.json").write_text(
        json.dumps({"decoder_start_token_id": 0, "text_config": {"eos_token_id": [2, 1]}})
    )
    plan = plan_vocabulary(TokenizerSetting("b"), [one, other], ["a", "b"], 0, [0, 1])
    assert plan.config == {
        "vocab_size": 3,
        "decoder_start_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    assert "decoder_start_token_id: '<start>' is not in the output; '<go>' replaces it." in plan.notes


def test_what_is_not_in_the_output_is_counted(family: dict[str, Model]) -> None:
    plan = planned(CASES["base-orders"], [family[n] for n in CASES["base-orders"]["models"]])
    assert [(dropped.tokens, dropped.rows) for dropped in plan.dropped] == [(0, 0), (1, 0), (4, 0)]
    other, base, third = (family[n].label for n in CASES["base-orders"]["models"])
    assert plan.notes == (
        f"the output has 16 tokens in 16 rows: the tokenizer of {other}.",
        f"the output lacks 1 token of {base}.",
        f"the output lacks 4 tokens of {third}.",
        f"{base} takes 3 rows from other tokens or models.",
        f"{third} takes 2 rows from other tokens or models.",
    )


def test_a_model_outside_the_merge_gives_rows_to_tokens_that_only_it_has(family: dict[str, Model]) -> None:
    sources = [family["chat"], family["base"]]
    plan = plan_vocabulary(TokenizerSetting("base"), sources, ["chat", "base"], 0, [1])
    assert (plan.rows[1].origin.tolist(), plan.rows[1].row.tolist()) == ([1] * 14 + [0, 0], list(range(16)))


def test_a_model_without_a_tokenizer_is_taken_to_have_the_donors_if_it_has_as_many_rows(
    family: dict[str, Model], tmp_path: Path
) -> None:
    bare = opened(tmp_path / "bare", 5, 14)
    plan = plan_of([family["base"], bare])
    assert (
        f"{bare.label} has no readable tokenizer; alnico assumes that of {family['base'].label}."
        in plan.notes
    )
    assert plan.rows[1].origin.tolist() == [1] * 14
    longer = opened(tmp_path / "longer", 5, 15)
    with pytest.raises(MismatchError) as caught:
        plan_of([family["base"], longer])
    assert str(caught.value) == (
        f"{longer.label}: has no readable tokenizer, and 15 rows where {family['base'].label} has 14; "
        "its tokens must be known. Put the tokenizer's files into the model's folder."
    )
    with pytest.raises(
        MismatchError,
        match=r"has no readable tokenizer .*but the recipe has tokenizer: {source: union}",
    ):
        plan_of([bare, family["base"]])


def test_rows_asked_from_where_they_are_not_are_told_together(family: dict[str, Model]) -> None:
    sources = [family[n] for n in ("base", "chat", "unused")]
    base, chat, unused = (s.label for s in sources)
    wishes = {
        "a": TokenSource("model", "chta"),
        "b": TokenSource("model_token", "chat", token_id=16),
        "c": TokenSource("model_token", "chat", token="<|im_strat|>"),
        "<|im_end|>": TokenSource("model", "base"),
        "d": TokenSource("model_token", "unused", token="<UNUSED_0>"),
    }
    with pytest.raises(RecipeError) as caught:
        plan_of(sources, TokenizerSetting("union", wishes))
    names = "base, chat, unused"
    assert str(caught.value).split("\n") == [
        f"tokenizer.tokens['a'].source: 'chta' is not a model of the recipe; expected one of {names}. Did you mean 'chat'?",
        f"tokenizer.tokens['b'].source.token_id is 16; {chat} has rows 0 to 15. Write one of these.",
        f"tokenizer.tokens['c'].source: {chat} has no row for '<|im_strat|>' (no such token). Did you mean '<|im_start|>'?",
        f"tokenizer.tokens['<|im_end|>'].source: {base} has no row for '<|im_end|>' (no such token). Name another model or token.",
        f"tokenizer.tokens['d'].source: {unused} has no row for '<UNUSED_0>' (it as token 14, and 14 rows). Name another model or token.",
    ]
    with pytest.raises(RecipeError) as caught:
        plan_of(sources, TokenizerSetting("nothing"))
    assert str(caught.value) == (
        f"tokenizer.source: 'nothing' is not a model of the recipe; expected one of {names}. Write it as under models."
    )
