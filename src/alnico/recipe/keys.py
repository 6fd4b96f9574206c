"""The keys of a recipe, by the place where they stand, and what each says: for the loader and for editors."""

from __future__ import annotations

from collections.abc import Mapping

Keys = Mapping[str, str]

TOP: Keys = {
    "merge_method": "The merge method of all tensors that no slice, module or rule under `methods` gives another.",
    "models": "The models to merge, whole. One of models, slices and modules.",
    "slices": "The layers of the output, from the first to the last, each slice made from equally many layers of its sources.",
    "modules": "Parts of a model with several stacks of layers (text decoder, vision tower), each with models or slices.",
    "methods": "Methods of their own for tensors by name: the first filter that fits wins, the rest uses merge_method.",
    "base_model": "What the others were tuned from; gives the output its config, tokenizer and side files.",
    "preset": "Option values that the method knows under a name; options given under parameters win over it.",
    "lines": "LiNeS: the merged task vector of layer l of L is multiplied by alpha + beta * l / (L - 1).",
    "parameters": "Options of the methods, for all tensors.",
    "tokenizer_source": "The output's vocabulary: union, base, or a model. The short form of tokenizer.",
    "tokenizer": "The output's vocabulary, and where the rows of its tokens come from.",
    "chat_template": "The output's chat template: auto, a built-in name, or the template itself in Jinja.",
    "dtype": "The dtype of the output, unless out_dtype is given; else the promotion of the inputs' dtypes.",
    "out_dtype": "The dtype of the output.",
    "missing": "What to do with a float tensor that a model lacks: error, copy or drop.",
    "unrelated": "What to do with models that were not tuned from one base: error or allow.",
    "seed": "Seed of random methods, a whole number of at most 64 bits; 0 if not given.",
    "name": "The name of this merge among several documents of a file; others take its output under this name.",
}

MAY_BE_EMPTY = (
    "base_model", "chat_template", "dtype", "models", "modules", "name", "out_dtype", "slices", "tokenizer", "tokenizer_source"
)  # fmt: skip
"""Keys of a recipe, and of a module, that count as not given where they are empty."""

ENTRY: Keys = {
    "model": "A path, or owner/name@revision on the hub, perhaps with +adapter.",
    "parameters": "Options for this model; they win over those of all other levels but the rules under `methods`.",
    "layer_range": "Without effect, as in mergekit: models are merged whole. Another range than all layers of the model is an error.",
}

SOURCE: Keys = {
    "model": ENTRY["model"],
    "layer_range": "The layers taken, [first, end): from 0, the end not among them.",
    "parameters": ENTRY["parameters"],
    "merge_method": "The same as merge_method of the slice; sources that name it must agree.",
}

SLICE: Keys = {
    "sources": "What the layers are made from: each source has as many layers as the others.",
    "base_model": "The base of this slice.",
    "merge_method": "The method of this slice.",
    "parameters": "Options for the tensors of this slice.",
    "residual_weight": "Without effect, here as in mergekit.",
}

MODULE: Keys = {
    "models": TOP["models"],
    "slices": TOP["slices"],
    "merge_method": "The method of this module.",
    "parameters": "Options for the tensors of this module.",
}

RULE: Keys = {
    "filter": "Which tensors: a part of the name, = and the whole name, re: and an expression, or * for all.",
    "merge_method": "The method of these tensors.",
    "parameters": "Options of this method; they win over all other levels. A list gives one value a model, in their order.",
    "model": "The one model that a method of one model takes: a reference, or base.",
    "preset": "Option values that this method knows under a name.",
}

CASE: Keys = {
    "filter": RULE["filter"],
    "value": "The value for these tensors: one, a list over the layers, or filters again.",
}

NORM_WEIGHT: Keys = {
    "from": "Where the L2 norms of the task vectors come from: l2_norm (the merge measures them) or analysis (of `alnico analyze`).",
    "path": "The folder of the analysis, or its summary.json; for `from: analysis`.",
    "mode": "How weights follow from norms L: linear (1 / L), power (1 / L^alpha) or exp (exp(-beta L / mean L)); exp if not given.",
    "beta": "Of exp, at least 0; 1 if not given. 0 gives all models the same weight.",
    "alpha": "Of power, above 0; 1.5 if not given.",
    "scale": "What the weights sum to; 1 if not given.",
    "per": "Over what norms are taken: model (all tensors with this weight), layer or tensor; model if not given.",
}

LINES: Keys = {
    "alpha": "The factor of the first layer.",
    "beta": "What the last layer's factor has more.",
}

TOKENIZER: Keys = {
    "source": "The tokens of the output: union of all, base, or those of a model.",
    "tokens": "Tokens by name, each with where its row comes from.",
    "pad_to_multiple_of": "Rows are added until their number is a multiple of this.",
    "tables": "Filters of the tensors with a row for each token, where sizes coincide and shapes do not tell which these are.",
}

TOKEN: Keys = {
    "source": "A model, {kind: zero}, or {kind: model_token, model: ..., token: ... | token_id: ...}.",
    "force": "Take the row for every model, also those that have the token.",
}

MODEL_TOKEN: Keys = {
    "kind": "model_token: the row of a token of a model. zero: zeros.",
    "model": "The model.",
    "token": "The token, as text.",
    "token_id": "The token's number.",
}

REFERENCE: Keys = {
    "model": "The model: its path or hub name, perhaps with a revision.",
    "lora": "An adapter to apply on it.",
    "override_architecture": "Without effect: names and shapes are read from the headers.",
}

PATH: Keys = {
    "path": "A path, or owner/name on the hub.",
    "revision": "A branch, tag or commit on the hub.",
}
