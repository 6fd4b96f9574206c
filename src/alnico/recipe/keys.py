"""Lists the keys of a recipe with their meanings, for the loader, the docs and the JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping

Keys = Mapping[str, str]

TOP: Keys = {
    "merge_method": "The method of all tensors for which no slice, module or rule under `methods` names another.",
    "models": "The models to merge, with all their layers. Give one of models, checkpoints, slices and modules.",
    "checkpoints": "The checkpoints of a training run, in place of models: the folder of the run, a glob, a list, or a mapping. The newest is the last model.",
    "slices": "The layers of the output, in order. Each slice merges equally many layers of each source.",
    "modules": "Parts of a model with several layer stacks (text decoder, vision tower): models or slices each.",
    "methods": "Rules: the first whose filter matches a tensor sets its method; others use merge_method.",
    "base_model": "The model the others were fine-tuned from. The output has its config, tokenizer and side files.",
    "preset": "A named set of option values of the method. Options under parameters override it.",
    "lines": "LiNeS: multiplies the merged task vector of layer l of L by alpha + beta * l / (L - 1).",
    "protect": "Keep what a model gives on its own inputs, known by their Gram matrices: all changes are taken out of these inputs.",
    "parameters": "Options of the methods, for all tensors.",
    "tokenizer_source": "The output's vocabulary: union, base, or a model. Short form of tokenizer.",
    "tokenizer": "The output's vocabulary, and where the embedding rows of its tokens come from.",
    "chat_template": "The output's chat template: auto, a built-in name, or the template itself in Jinja.",
    "dtype": "The dtype of the output; out_dtype overrides it. Default: the inputs' dtypes, promoted.",
    "out_dtype": "The dtype of the output.",
    "missing": "What to do with a floating-point tensor that some model lacks: error, copy or drop.",
    "unrelated": "What to do with models that do not share one base: error or allow.",
    "base_mismatch": "What to do with a stored task vector on another base than its own: error or allow.",
    "complete_from": "A model that gives what no merged model has: tensors, by name, keys of the config and side files.",
    "routers": "The routers of mixtures of experts: merge, base, the model that they are copied from, or {calibrate: DIR} with the statistics they are fitted to.",
    "requantise": "Write the output in fp8, as the base is stored: fp8. The base, or else the first model, must be stored in it.",
    "seed": "The seed of random methods, an integer of at most 64 bits; default 0.",
    "name": "The name of this document among several. Others refer to its output by this name.",
}

MIXTURE: Keys = {
    "base_model": "The dense model that gives attention, norms, embeddings and head, and config, tokenizer and side files.",
    "experts": "The experts, in order. A document with this key builds a mixture; it has no merge_method.",
    "shared_experts": "At most one expert that every token passes, for an architecture that has it: qwen or deepseek.",
    "architecture": "The kind of mixture: mixtral, qwen or deepseek. Default: mixtral for llama and mistral, qwen for qwen2 and qwen3.",
    "experts_per_token": "How many experts a token passes; default 2.",
    "gate_mode": "How the gates are made: hidden (default), hidden_avg, cheap_embed, ridge, random or uniform_random.",
    "gates": "The folder of gates that `alnico moe` measured from prompts; default: next to the output.",
    "gate_scale": "A factor on the gates, above 0: the higher it is, the less a token is shared among its experts. Default 10 for ridge, else 1.",
    "ridge": "For gate_mode ridge: the share of the mean diagonal that is added to the diagonal, above 0; default 0.01.",
    "others": "All tensors outside of the experts: base (those of base_model, the default) or average (over the experts).",
    "dtype": TOP["dtype"],
    "out_dtype": TOP["out_dtype"],
    "unrelated": "For `others: average`: what to do with experts that do not share one base: error or allow.",
    "seed": "The seed of random gates, an integer of at most 64 bits; default 0.",
    "name": TOP["name"],
}

EXPERT: Keys = {
    "source_model": "The model whose layers' MLPs are this expert: a path, a URL, or owner/name@revision on the hub; +adapter may follow.",
    "source_models": "Several models in its place, of which the expert is the average.",
    "positive_prompts": "Prompts that this expert is for. Needed for the gate modes of prompts.",
    "negative_prompts": "Prompts that it is not for.",
    "gram": "For gate_mode ridge: the folder of `alnico statistics gram` of this expert on its own data.",
    "rank": "The share of singular vectors that is kept of the expert's task vector, in (0, 1]; the rest is that of base_model.",
    "residual_scale": "A factor on the expert's down projections, and so on its output; default 1.",
    "noise_scale": "Noise on the expert's weights. Only 0 is accepted: add noise where you train the mixture.",
}

MAY_BE_EMPTY = (
    "base_model", "chat_template", "dtype", "models", "modules", "name", "out_dtype", "slices", "tokenizer", "tokenizer_source"
)  # fmt: skip
"""Keys of a recipe or a module that are ignored if they are empty."""

ENTRY: Keys = {
    "model": "A path, a URL, or owner/name@revision on the hub; +adapter may follow.",
    "parameters": "Options for this model. They override all other levels except the rules under `methods`.",
    "layer_range": "No effect, as in mergekit: all layers are merged. A range that leaves layers out is an error.",
}

SOURCE: Keys = {
    "model": ENTRY["model"],
    "layer_range": "The layers to take, [first, end): counted from 0, without the end.",
    "parameters": ENTRY["parameters"],
    "merge_method": "The same as merge_method of the slice. All sources that name a method must agree.",
}

SLICE: Keys = {
    "sources": "The models and layers to merge. All sources have the same number of layers.",
    "base_model": "The base model of this slice.",
    "merge_method": "The method of this slice.",
    "parameters": "Options for the tensors of this slice.",
    "residual_weight": "No effect, as in mergekit.",
}

MODULE: Keys = {
    "models": TOP["models"],
    "slices": TOP["slices"],
    "merge_method": "The method of this module.",
    "parameters": "Options for the tensors of this module.",
}

RULE: Keys = {
    "filter": "The tensors: part of a name, = and the whole name, re: and a regular expression, block: and blocks of an image model, or * for all.",
    "merge_method": "The method of these tensors; drop leaves them out of the output.",
    "parameters": "Options of this method. They override all others except those under models of the rule. A list has one value per model, in order.",
    "model": "For a method that takes one model: that model's reference, or base.",
    "models": "The models of this rule, in its order, in place of the recipe's. They need not be among those.",
    "base_model": "The base of this rule, in place of the recipe's; null for none.",
    "preset": "A named set of option values of this method.",
}

RULE_MODEL: Keys = {
    "model": ENTRY["model"],
    "parameters": "Options for this model under this rule. They override the rule's own.",
}

CASE: Keys = {
    "filter": RULE["filter"],
    "value": "The value for these tensors: a single value, a list over the layers, or nested filters.",
}

BLOCKS: Keys = {
    "blocks": "The values by block of an image model: the name of a preset, a list with a number for each block, or blocks with values.",
    "value": "The value of all other tensors.",
}

NORM_WEIGHT: Keys = {
    "from": "The source of the L2 norms of task vectors: l2_norm (measured here), analysis (`alnico analyze`) or given.",
    "norms": "The norms, one per model with this weight, in the order of the recipe; for `from: given`.",
    "path": "The folder of the analysis, or its summary.json; for `from: analysis`.",
    "mode": "The weight for norm L: linear (1 / L), power (1 / L^alpha) or exp (exp(-beta L / mean L)); default exp.",
    "beta": "For mode exp, at least 0; default 1. 0 gives all models the same weight.",
    "alpha": "For mode power, above 0; default 1.5.",
    "scale": "The sum of the weights; default 1.",
    "per": "What a norm is taken over: model (all tensors with this weight), layer or tensor; default model.",
}

SCHEDULE_WEIGHT: Keys = {
    "from": "schedule: the weight follows from the place among the models, which are the checkpoints of a run, the newest last.",
    "shape": "The decay of a learning rate that the average emulates: uniform or linear (equal weights), cosine, 1-sqrt, ema or wma; or a list with the factor of the rate at each checkpoint, the oldest first.",
    "decay": "For shape ema: the share of the average that each checkpoint keeps, in (0, 1); default 0.8.",
}

CHECKPOINTS: Keys = {
    "run": "The folder of the run, whose folders or files have a step in their names; a glob; a list of them; or the name of a model of the hub and a revision with * for the step, with steps.",
    "last": "How many of the newest checkpoints; default: all.",
    "every": "Take each Nth checkpoint, counted back from the newest; default 1. last counts those that are taken.",
    "steps": "The first and the last step, [from, to]; or [from, to, every], where each of these steps must be there.",
    "ema": "true: the averaged weights that the trainer kept, in files of their own or inside each checkpoint; default false.",
}

PROTECT: Keys = {
    "gram": "The directory that `alnico statistics gram` wrote for the protected model.",
    "energy": "The share of the squares of its inputs that keeps its outputs, in (0, 1]; default 0.99.",
    "model": "The protected model; default base_model. It need not be among the models.",
    "others": "Tensors without a Gram matrix (embeddings, norms, biases): keep those of the protected model, or merge; default keep.",
}

LINES: Keys = {
    "alpha": "The factor of the first layer.",
    "beta": "Added to alpha for the last layer.",
}

ROUTERS: Keys = {
    "calibrate": "The directory that `alnico statistics routers` wrote for the models.",
}

TOKENIZER: Keys = {
    "source": "The tokens of the output: union (of all models), base, or a model.",
    "tokens": "Tokens by name, each with the source of its embedding row.",
    "pad_to_multiple_of": "Add rows until their number is a multiple of this.",
    "tables": "Filters of the tensors with one row per token, needed if shapes do not show which they are.",
    "approximate": "How each model makes rows of tokens that it lacks, of its own rows: omp, subword or mean. Without it, rows come from other models.",
    "atoms": "The most rows that omp combines; default 64.",
}

TOKEN: Keys = {
    "source": "A model, {kind: zero}, or {kind: model_token, model: ..., token: ... | token_id: ...}.",
    "force": "Use this row for every model, including models that have the token.",
}

MODEL_TOKEN: Keys = {
    "kind": "model_token: the row of a token of a model. zero: zeros.",
    "model": "The model.",
    "token": "The token, as text.",
    "token_id": "The token's id.",
}

REFERENCE: Keys = {
    "model": "The model: its path, or its name on the hub; a revision may follow.",
    "lora": "An adapter to apply to it.",
    "override_architecture": "No effect: names and shapes are read from the headers.",
}

PATH: Keys = {
    "path": "A path, a URL, or owner/name on the hub.",
    "revision": "A branch, tag or commit on the hub.",
}
