"""The vocabulary that a recipe asks for."""

from __future__ import annotations

from alnico.recipe import scalars
from alnico.recipe.keys import MODEL_TOKEN, TOKEN, TOKENIZER
from alnico.recipe.models import read_reference
from alnico.recipe.parameters import parse_filter
from alnico.recipe.schema import TokenizerSetting, TokenSource
from alnico.recipe.yaml_nodes import Node, ParseContext, one_line, quote


def read_tokenizer(keys: dict[str, Node], reading: ParseContext) -> TokenizerSetting | None:
    """Read ``tokenizer``, or ``tokenizer_source`` which is its short form."""
    short, long = keys.get("tokenizer_source"), keys.get("tokenizer")
    if short is not None and long is not None:
        reading.wrong(
            short.line,
            "tokenizer and tokenizer_source are both given; expected one. Remove tokenizer_source.",
        )
    if long is None:
        if short is None:
            return None
        source = _source(short, "tokenizer_source", reading)
        return TokenizerSetting(source) if source is not None else None
    found = scalars.mapping(long, "tokenizer", TOKENIZER, "a mapping with `source`", reading)
    source = _source(found["source"], "tokenizer.source", reading) if "source" in found else "union"
    padding = scalars.lenient_integer(
        found.get("pad_to_multiple_of"), "tokenizer.pad_to_multiple_of", 1, reading
    )
    tokens = _tokens(found.get("tokens"), reading)
    tables = _tables(found.get("tables"), reading)
    return TokenizerSetting(source, tokens, padding, tables) if source is not None else None


def _tables(node: Node | None, reading: ParseContext) -> tuple[str, ...]:
    if node is None or node.value is None:
        return ()
    items = node.value if isinstance(node.value, list) else [node]
    found = [parse_filter(item, f"tokenizer.tables[{i}]", reading) for i, item in enumerate(items)]
    return tuple(f for f in found if f)


OF_A_MODEL = "model:"
"""What mergekit wanted before the path of a tokenizer's model until its version 0.0.4."""


def _source(node: Node, where: str, reading: ParseContext) -> str | None:
    """Whose vocabulary the output has: union, base, or a model."""
    source = read_reference(node, where, node.line, reading)
    if source is None or not source.startswith(OF_A_MODEL):
        return source
    model = source.removeprefix(OF_A_MODEL).strip()
    if not model:
        reading.wrong(node.line, f"{where} is {quote(source)}; expected union, base or the path of a model.")
        return None
    reading.note(
        node.line, f"{where}: {quote(source)} as the model {quote(model)}, as mergekit once wrote it."
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
    keys = scalars.mapping(node, where, TOKEN, "a mapping with `source` and perhaps `force`", reading)
    force = scalars.lenient_boolean(keys.get("force"), f"{where}.force", reading)
    source = keys.get("source")
    if source is None or source.value is None:
        return TokenSource(force=force)
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
        found = "both" if "token" in inner else "none"
        reading.wrong(source.line, f"{where}.source has {found} of token and token_id; expected one.")
    return TokenSource("model_token", model or "", token if isinstance(token, str) else None, number, force)
