"""Which tensors have a row for each token: by shapes and the config, by names only where sizes coincide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import Model
from alnico.errors import MismatchError
from alnico.vocabulary.tables import find_tables
from made import read_model, save_model
from made_tokenizers import save_tokenizer
from methods.sides import made

V, WIDTH = 11, 4


def model(
    folder: Path, shapes: dict[str, tuple[int, ...]], tokens: str = "", factor: float = 1.0, **config: Any
) -> Model:
    """A model of tensors whose values count up, times ``factor``; ``tokens`` are those of its tokenizer, by their rows."""
    values = {
        n: ("F32", factor * np.arange(np.prod(s), dtype=np.float32).reshape(s)) for n, s in shapes.items()
    }
    save_model(folder, values, config)
    if tokens:
        save_tokenizer(folder, {t: i for i, t in enumerate(tokens)})
    return open_model(folder)


LAYER = {
    "layers.0.fc.weight": (8, WIDTH),
    "layers.0.norm.weight": (WIDTH,),
    "layers.1.fc.weight": (8, WIDTH),
    "layers.1.norm.weight": (WIDTH,),
}


@pytest.mark.parametrize(
    ("tables", "others"),
    [
        (
            {
                "model.embeddings.tok_embeddings.weight": (V, WIDTH),
                "decoder.weight": (V, WIDTH),
                "decoder.bias": (V,),
            },
            {"head.norm.bias": (4,)},
        ),
        (
            {"shared.weight": (V, WIDTH), "final_logits_bias": (1, V)},
            {"encoder.embed_positions.weight": (V, WIDTH)},
        ),
        (
            {"cls.predictions.decoder.weight": (V, 2), "cls.predictions.dense.weight": (2, V)},
            {"token_type_embeddings.weight": (2, WIDTH)},
        ),
        ({"some.unheard.of": (V, WIDTH), "ctc.conv.weight": (V, WIDTH, 1)}, {"pos_embed": (1, V, WIDTH)}),
        (
            {"transformer.w.weight": (V, WIDTH), "layers.1.gate.tid2eid": (V, 2)},
            {"transformer.r.weight": (V + 1, WIDTH)},
        ),
    ],
)
def test_every_tensor_of_the_vocabularys_size_is_a_table(
    tables: dict[str, tuple[int, ...]], others: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    found = find_tables(model(tmp_path / "a", {**LAYER, **others, **tables}, vocab_size=V, hidden_size=WIDTH))
    assert (found.size, set(found.rows), found.unclear) == (V, set(tables), ())
    assert found.turned == {n for n in tables if n.endswith("dense.weight")}


def test_names_decide_where_the_vocabulary_is_as_large_as_the_hidden_size(tmp_path: Path) -> None:
    tables = {
        "embeddings.word_embeddings.weight": (V, V),
        "lm_head.bias": (V,),
        "pred_layer.proj.weight": (V, V),
    }
    others = {
        "norm.weight": (V,),
        "layers.0.q_proj.weight": (V, V),
        "pooler.dense.weight": (V, V),
        "classifier.weight": (V, V),
    }
    others |= {
        "vision_tower.head.probe": (1, 1, V),
        "encoder.ln.weight": (V,),
        "encoder.ln.bias": (V,),
        "multi_modal_projector.w": (V, V),
    }
    found = find_tables(model(tmp_path / "a", {**tables, **others}, vocab_size=V, hidden_size=V))
    assert (set(found.rows), found.unclear) == (set(tables), ())
    found = find_tables(
        model(tmp_path / "b", {**tables, **others, "mystery.weight": (V, V)}, vocab_size=V, hidden_size=V)
    )
    assert found.unclear == ("mystery.weight",)


def test_the_vocabulary_of_text_is_told_from_others_and_from_a_config_that_is_not_true(
    tmp_path: Path,
) -> None:
    shapes = {
        "language_model.embed_tokens.weight": (V, WIDTH),
        "audio.embedding.weight": (7, WIDTH),
        "wte.weight": (9, WIDTH),
    }
    config = {"text_config": {"vocab_size": V}, "audio_config": {"vocab_size": 7}, "vocab_size": 9}
    assert find_tables(model(tmp_path / "a", shapes, **config), V).size == V
    assert find_tables(model(tmp_path / "b", shapes, **config), 8).size == 9
    assert find_tables(model(tmp_path / "c", shapes, vocab_size=50), 8).size == 9
    longer = {"embed_tokens.weight": (V + 3, WIDTH), "lm_head.weight": (V, WIDTH)}
    assert find_tables(model(tmp_path / "d", longer, vocab_size=V)).rows == {
        "embed_tokens.weight": V + 3,
        "lm_head.weight": V,
    }


def merged(folder: Path, **tokenizer: Any) -> dict[str, np.ndarray]:
    recipe = {
        "merge_method": "linear",
        "models": [str(folder / n) for n in "ab"],
        "tokenizer": {"source": "union", **tokenizer},
    }
    alnico.merge({**recipe, "unrelated": "allow"}, folder / "out")
    return read_model(folder / "out")


def test_what_cannot_be_told_is_refused_with_what_to_write_and_merged_when_it_is_written(
    tmp_path: Path,
) -> None:
    shapes = {"model.embed_tokens.weight": (4, 4), "mystery.weight": (4, 4), "layers.0.q_proj.weight": (4, 4)}
    model(tmp_path / "a", shapes, "abcd", vocab_size=4, hidden_size=4)
    model(tmp_path / "b", shapes, "dcba", 2.0, vocab_size=4, hidden_size=4)
    with pytest.raises(MismatchError) as told:
        merged(tmp_path)
    assert str(told.value) == (
        f"{tmp_path / 'a'}: mystery.weight is (4, 4), and 4 is the size of the vocabulary and also another size of the model, so it is unclear "
        "which tensors have a row for each token. List them in the recipe: "
        "tokenizer: {source: union, tables: [model.embed_tokens.weight, mystery.weight, ...]}."
    )
    out = merged(tmp_path, tables=["=model.embed_tokens.weight", "mystery"])
    one = np.arange(16, dtype=np.float64).reshape(4, 4)
    for name in ("model.embed_tokens.weight", "mystery.weight"):
        np.testing.assert_array_equal(out[name], (one + 2 * one[::-1]) / 2)
    np.testing.assert_array_equal(out["layers.0.q_proj.weight"], 1.5 * one)


def test_a_column_for_each_token_moves_as_rows_do(tmp_path: Path) -> None:
    shapes = {
        "embed_tokens.weight": (4, 3),
        "cls.predictions.dense.weight": (5, 4),
        "final_logits_bias": (1, 4),
    }
    model(tmp_path / "a", shapes, "abcd", vocab_size=4)
    model(tmp_path / "b", shapes, "efab", 2.0, vocab_size=4)
    out = merged(tmp_path, pad_to_multiple_of=8)
    one = np.arange(20, dtype=np.float64).reshape(5, 4)
    tokens = [
        (one[:, 0] + 2 * one[:, 2]) / 2,
        (one[:, 1] + 2 * one[:, 3]) / 2,
        one[:, 2],
        one[:, 3],
        2 * one[:, 0],
        2 * one[:, 1],
    ]
    np.testing.assert_allclose(out["cls.predictions.dense.weight"][:, :6], np.stack(tokens, 1))
    padding = np.stack(tokens, 1).mean(
        1
    )  # that of both models alike: a token that one lacks has the other's row in both
    np.testing.assert_allclose(
        out["cls.predictions.dense.weight"][:, 6:], np.stack([padding, padding], 1), rtol=1e-6
    )
    np.testing.assert_allclose(out["final_logits_bias"][0, :6], [2, 3.5, 2, 3, 0, 2])


def test_a_model_without_a_table_is_refused_where_rows_move(tmp_path: Path) -> None:
    for name, tokens in (("a", "abcd"), ("b", "dcba")):
        model(tmp_path / name, {"some.weight": (5, 3)}, tokens)
    with pytest.raises(
        MismatchError,
        match=r"no tensor has as many rows as its config or tokenizer has tokens; expected an embedding",
    ):
        merged(tmp_path)


def test_ids_that_mean_more_than_a_token_do_not_move(tmp_path: Path) -> None:
    shapes = {"language_model.embed_tokens.weight": (6, 3), "embed_vision.embedding.weight": (2, 3)}
    config = {"text_config": {"vocab_size": 6}, "vision_config": {"vocab_size": 2, "vocab_offset": 4}}
    model(tmp_path / "a", shapes, "abcdef", **config)
    model(tmp_path / "b", shapes, "abcdfe", **config)
    with pytest.raises(MismatchError, match=r"vocab_offset: 4, so ids from 4 are for images and sounds"):
        merged(tmp_path)


def test_embeddings_per_layer_with_fewer_rows_follow_their_tokens(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (6, 3), "model.embed_tokens_per_layer.weight": (4, 2)}
    config = {"vocab_size": 6, "vocab_size_per_layer_input": 4}
    model(tmp_path / "a", shapes, "abcdef", **config)
    model(tmp_path / "b", shapes, "fabcde", 2.0, **config)
    out = merged(tmp_path)
    one = np.arange(8, dtype=np.float64).reshape(4, 2)
    a, b = [0, 1, 2, 3, 0, 0], [1, 2, 3, 0, 0, 0]  # a token beyond the rows has the first one
    np.testing.assert_array_equal(out["model.embed_tokens_per_layer.weight"], (one[a] + 2 * one[b]) / 2)
    assert open_model(tmp_path / "out").config["vocab_size_per_layer_input"] == 6


def test_statistics_by_the_rows_of_another_vocabulary_are_not_used(tmp_path: Path) -> None:
    """A Fisher merge of a table with an unusual name makes the plain mean of each token, as for one with a usual name."""
    shapes = {"transformer.w.weight": (4, 3), "fc.weight": (5, 3)}
    for number, (name, tokens) in enumerate((("a", "abcd"), ("b", "dcba"))):
        model(tmp_path / name, shapes, tokens, 1.0 + number, vocab_size=4)
    sides = [made("fisher", tmp_path / n, i) for i, n in enumerate("ab")]
    entries = [
        {"model": str(tmp_path / n), "parameters": {"fisher": str(s)}}
        for n, s in zip("ab", sides, strict=True)
    ]
    recipe = {"merge_method": "fisher", "models": entries, "tokenizer_source": "union", "unrelated": "allow"}
    alnico.merge(recipe, tmp_path / "out")
    one = np.arange(12, dtype=np.float64).reshape(4, 3)
    np.testing.assert_allclose(
        read_model(tmp_path / "out")["transformer.w.weight"], (one + 2 * one[::-1]) / 2
    )


def test_rows_that_a_tied_head_lacks_are_those_of_another_models_head(tmp_path: Path) -> None:
    shapes = {"backbone.embeddings.weight": (4, 3), "lm_head.weight": (4, 3)}
    kind = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 4}
    model(tmp_path / "a", shapes, "abcd", 3.0, **kind, tie_word_embeddings=False)
    model(tmp_path / "b", {"backbone.embeddings.weight": (4, 3)}, "ebca", **kind, tie_word_embeddings=True)
    out = merged(tmp_path)
    one = np.arange(12, dtype=np.float64).reshape(4, 3)
    expected = [(3 * one[0] + one[3]) / 2, 2 * one[1], 2 * one[2], 3 * one[3], one[0]]
    np.testing.assert_allclose(out["lm_head.weight"], expected)
    np.testing.assert_allclose(out["backbone.embeddings.weight"], expected)


def test_a_base_model_with_a_longer_embedding_and_a_head_with_lengths_behind_the_tokens_follow(
    tmp_path: Path,
) -> None:
    assert (
        find_tables(
            model(tmp_path / "a", {"embed_tokens.weight": (V + 8, WIDTH), **LAYER}, vocab_size=V), V
        ).size
        == V
    )
    shapes = {
        "decoder.embedding.weight": (V, WIDTH),
        "joint.head.weight": (V + 5, WIDTH),
        "joint.head.bias": (V + 5,),
    }
    others = {"vqmodel.decoder.mid.proj_out.bias": (V + 5,)}
    assert find_tables(model(tmp_path / "b", {**shapes, **others}, vocab_size=V)).rows == {
        n: s[0] for n, s in shapes.items()
    }
