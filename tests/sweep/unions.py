"""A union of two tokenizers on any architecture: every table against each token's mean in float64, and the model loaded again.

Which tensors are tables is told without alnico: they are those that change their shape with the size of the text vocabulary.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import alnico

sys.path[:0] = [str(Path(__file__).parents[1])]

import architectures  # noqa: E402
import made_tokenizers  # noqa: E402

VOCAB = 101
"""No other size of the small models, nor three times one."""
LACKING = 4
"""Tokens that the second model lacks; it has as many others, so that the union has other rows than either."""


def vocabularies(rows: int) -> tuple[list[str], list[str]]:
    """Tokens by their rows: the second model has most of the first one's in another order, and some of its own."""
    first = [f"w{i}" for i in range(rows)]
    shared = first[3 : rows - LACKING]
    return first, [*first[:3], *shared[7:], *shared[:7], *(f"n{i}" for i in range(LACKING))]


def save(module: Any, folder: Path, tokens: Sequence[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.save_pretrained(folder)
    made_tokenizers.save_tokenizer(folder, {t: i for i, t in enumerate(tokens)})


def read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def grown(config: Any, by: int = 1) -> Any:
    """A config whose text vocabulary is larger, told by transformers alone. ValueError where it has several."""
    text = config.get_text_config()
    old = text.vocab_size
    sides = [getattr(config, key, None) for key in ("encoder", "decoder")]  # both of one tokenizer
    sides += [side.get_text_config() for side in sides if hasattr(side, "get_text_config")]
    for part in {id(c): c for c in (config, text, *sides)}.values():
        for key in (
            "vocab_size",
            "vocab_size_per_layer_input",
            "decoder_vocab_size",
            "src_vocab_size",
            "tgt_vocab_size",
        ):
            if getattr(part, key, None) == old:
                setattr(part, key, old + by)
    return config


def tables(name: str, stored: dict[str, Any], folder: Path, **options: Any) -> dict[str, int]:
    """The tensors of a file that follow the size of the text vocabulary, and along which dimension."""
    import torch
    import transformers

    config = grown(architectures.config_of(name, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        getattr(transformers, name)(config).save_pretrained(folder)
    other = read(folder)
    found = {}
    for n, tensor in stored.items():
        if n in other and other[n].shape != tensor.shape:
            (found[n],) = (
                i for i, (a, b) in enumerate(zip(tensor.shape, other[n].shape, strict=True)) if a != b
            )
    return found


def expected(a: Any, b: Any, axis: int | None, tokens: Sequence[Sequence[str]]) -> Any:
    """The mean of two tensors in float64; of each token, where they have rows of tokens."""
    import torch

    if axis is None:
        return (a.double() + b.double()) / 2
    union = [*tokens[0], *(t for t in tokens[1] if t not in set(tokens[0]))]
    places = [{t: i for i, t in enumerate(of)} for of in tokens]
    rows = []
    for token in union:
        held = [x.select(axis, p[token]).double() for x, p in zip((a, b), places, strict=True) if token in p]
        rows.append(sum(held) / len(held))
    rest = [
        x.narrow(axis, len(of), x.shape[axis] - len(of)).double()
        for x, of in zip((a, b), tokens, strict=True)
    ]
    return torch.cat([torch.stack(rows, axis), (rest[0] + rest[1]) / 2], axis)


def union(name: str, folder: Path, *, vocab: int = VOCAB, **options: Any) -> dict[str, int]:
    """Merge two models of an architecture with a union of their tokenizers, check all, and return the tables.

    AlnicoError of a refusal goes through. ValueError where transformers does not say which vocabulary is that of text.
    """
    import torch
    import transformers

    vocab = architectures.config_of(name, vocab=vocab, **options).get_text_config().vocab_size
    tokens = vocabularies(vocab)
    for seed, key in enumerate("ab"):
        save(architectures.make(name, vocab=vocab, seed=seed, **options), folder / key, tokens[seed])
    one, other = (read(folder / key) for key in "ab")
    axes = tables(name, one, folder / "grown", vocab=vocab, **options)
    recipe = {
        "merge_method": "linear",
        "models": [str(folder / "a"), str(folder / "b")],
        "tokenizer_source": "union",
    }
    alnico.merge({**recipe, "unrelated": "allow"}, folder / "out")
    out = read(folder / "out")
    assert out.keys() == one.keys()
    for n, found in out.items():
        if not found.is_floating_point():
            continue
        right = expected(one[n], other[n], axes.get(n), tokens)
        assert found.shape == right.shape, (n, found.shape, right.shape)
        torch.testing.assert_close(
            found.double(), right, rtol=1e-6, atol=1e-7, msg=lambda text, n=n: f"{n}: {text}"
        )
    if axes:
        config = json.loads((folder / "out" / "config.json").read_text())
        assert vocab + LACKING in {
            v for part in (config, *sections(config)) for k, v in part.items() if k.endswith("vocab_size")
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, report = getattr(transformers, name).from_pretrained(folder / "out", output_loading_info=True)
        _, before = getattr(transformers, name).from_pretrained(folder / "a", output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert set(report[key]) <= set(before[key]), (key, report[key])
    return axes


def sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    inner = [v for v in config.values() if isinstance(v, dict)]
    return [*inner, *(s for part in inner for s in sections(part))]


def main() -> None:
    """``python tests/sweep/unions.py KIND...``: the outcome of each architecture of the kinds."""
    import tempfile

    from alnico.errors import AlnicoError

    for name in dict.fromkeys(n for kind in sys.argv[1:] for n in architectures.of_kind(kind)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                told = f"equal, {len(union(name, Path(folder)))} tables"
            except AlnicoError as error:
                told = f"refused: {error}"
            except AssertionError as error:
                told = f"wrong: {error}"
            except Exception as error:  # transformers cannot make it, or says no vocabulary of text
                told = f"not tried: {error}"
        print(f"{name}: {' '.join(told.split())[:300]}", flush=True)


if __name__ == "__main__":
    main()
