"""Reads ``tokenizer``: the output's vocabulary and the sources of its tokens' rows."""

from __future__ import annotations

from alnico.recipe import scalars
from alnico.recipe.keys import MODEL_TOKEN, TOKEN, TOKENIZER
from alnico.recipe.models import read_reference
from alnico.recipe.parameters import parse_filter
from alnico.recipe.schema import APPROXIMATIONS, ATOMS, Approximate, TokenizerSetting, TokenSource
from alnico.recipe.yaml_nodes import Node, ParseContext, one_line, quote, shorten


def read_tokenizer(keys: dict[str, Node], reading: ParseContext) -> TokenizerSetting | None:
    """Read ``tokenizer``, or its short form ``tokenizer_source``."""
    short, long = keys.get("tokenizer_source"), keys.get("tokenizer")
    if short is not None and long is not None:
        reading.wrong(
            short.line,
            "tokenizer and tokenizer_source are both present; expected one. Remove tokenizer_source.",
        )
    if long is None:
        if short is None:
            return None
        source = _source(short, "tokenizer_source", reading)
        return TokenizerSetting(source) if source is not None else None
    if isinstance(long.value, str):
        reading.wrong(
            long.line,
            f"tokenizer is {long.kind}; expected a mapping with `source`. Did you mean tokenizer_source: "
            f"{shorten(long.value)}?",
        )
        return None
    settings = scalars.mapping(long, "tokenizer", TOKENIZER, "a mapping with `source`", reading)
    source = _source(settings["source"], "tokenizer.source", reading) if "source" in settings else "union"
    padding = scalars.lenient_integer(
        settings.get("pad_to_multiple_of"), "tokenizer.pad_to_multiple_of", 1, reading
    )
    tokens = _tokens(settings.get("tokens"), reading)
    tables = _tables(settings.get("tables"), reading)
    approximate, atoms = _approximation(settings, source, reading)
    return (
        TokenizerSetting(source, tokens, padding, tables, approximate, atoms) if source is not None else None
    )


def _approximation(
    settings: dict[str, Node], source: str | None, reading: ParseContext
) -> tuple[Approximate | None, int]:
    """Read ``approximate`` and ``atoms``."""
    node, number = settings.get("approximate"), settings.get("atoms")
    atoms = scalars.lenient_integer(number, "tokenizer.atoms", 1, reading)
    way = next((w for w in APPROXIMATIONS if node is not None and node.value == w), None)
    if node is not None and node.value is not None and way is None:
        hint = scalars.nearest(str(node.value), APPROXIMATIONS)
        reading.wrong(
            node.line, f"tokenizer.approximate is {node.kind}; expected omp, subword or mean. {hint}"
        )
    elif way is not None and source == "union":
        reading.wrong(
            node.line if node is not None else 0,
            f"tokenizer.approximate is {way}, and the source is union; expected base or a model, whose tokens the output has. Write "
            "tokenizer: {source: MODEL, approximate: " + way + "}.",
        )
    elif number is not None and atoms is not None and way != "omp":
        reading.wrong(
            number.line,
            "tokenizer.atoms is given without approximate: omp, which alone uses it; expected both. Remove atoms, or add approximate: omp.",
        )
    return way, atoms or ATOMS


def _tables(node: Node | None, reading: ParseContext) -> tuple[str, ...]:
    if node is None or node.value is None:
        return ()
    items = node.value if isinstance(node.value, list) else [node]
    filters = [parse_filter(item, f"tokenizer.tables[{i}]", reading) for i, item in enumerate(items)]
    return tuple(pattern for pattern in filters if pattern)


MODEL_PREFIX = "model:"
"""mergekit up to 0.0.4 required it before the path of the tokenizer's model."""


def _source(node: Node, where: str, reading: ParseContext) -> str | None:
    """Read the source of the output's vocabulary: union, base, or a model."""
    source = read_reference(node, where, node.line, reading)
    if source is None or not source.startswith(MODEL_PREFIX):
        return source
    model = source.removeprefix(MODEL_PREFIX).strip()
    if not model:
        reading.wrong(node.line, f"{where} is {quote(source)}; expected union, base or the path of a model.")
        return None
    reading.note(
        node.line, f"{where}: {quote(source)} means the model {quote(model)}, as in old versions of mergekit."
    )
    return model


def _tokens(node: Node | None, reading: ParseContext) -> dict[str, TokenSource]:
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        reading.wrong(
            node.line,
            f"tokenizer.tokens is {node.kind}; expected a mapping of tokens to `source` and `force`.",
        )
        return {}
    return {
        token: _token(item, f"tokenizer.tokens.{one_line(token)}", reading)
        for token, item in node.value.items()
    }


def _token(node: Node, where: str, reading: ParseContext) -> TokenSource:
    keys = scalars.mapping(node, where, TOKEN, "a mapping with `source` and optionally `force`", reading)
    force = scalars.lenient_boolean(keys.get("force"), f"{where}.force", reading)
    source = keys.get("source")
    if source is None or source.value is None:
        return TokenSource(force=force)
    if isinstance(source.value, dict) and any(scalars.misspelt_key(key, ("kind",)) for key in source.value):
        source = Node(
            scalars.mapping(source, f"{where}.source", MODEL_TOKEN, "a mapping with `kind`", reading),
            source.line,
        )
    if not isinstance(source.value, dict) or "kind" not in source.value:
        model = read_reference(source, f"{where}.source", source.line, reading)
        return TokenSource("model", model or "", force=force)
    kind = source.value["kind"]
    if kind.value == "zero":
        scalars.mapping(source, f"{where}.source", ("kind",), "a mapping with `kind`", reading)
        return TokenSource("zero", force=force)
    if kind.value != "model_token":
        reading.wrong(kind.line, f"{where}.source.kind is {kind.kind}; expected model_token or zero.")
        return TokenSource(force=force)
    inner = scalars.mapping(source, f"{where}.source", MODEL_TOKEN, "a mapping with `kind`", reading)
    model = read_reference(inner.get("model"), f"{where}.source.model", source.line, reading)
    number = scalars.lenient_integer(inner.get("token_id"), f"{where}.source.token_id", 0, reading)
    token = inner["token"].value if "token" in inner else None
    if "token" in inner and (not isinstance(token, str) or not token):
        reading.wrong(
            inner["token"].line, f"{where}.source.token is {quote(token)}; expected text. Put it in quotes."
        )
    elif ("token" in inner) == ("token_id" in inner):
        present = "both" if "token" in inner else "none"
        reading.wrong(source.line, f"{where}.source has {present} of token and token_id; expected one.")
    return TokenSource("model_token", model or "", token if isinstance(token, str) else None, number, force)
