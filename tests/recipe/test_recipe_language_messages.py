"""What a wrong recipe of slices, modules, rules, filters and vocabularies is told: word for word, with its line."""

from __future__ import annotations

import pytest

from alnico.errors import RecipeError
from alnico.recipe.load import parse_recipe

LANGUAGE = {
    "models and slices": (
        "merge_method: linear\nmodels: [a]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
        "3: models and slices are both present; expected one of models, checkpoints, slices and modules. Remove one.",
    ),
    "slices empty": (
        "merge_method: linear\nslices: []",
        "2: slices is a list of 0; expected a list of 1 to 1000 slices, each with `sources`.",
    ),
    "slices text": (
        "merge_method: linear\nslices: a",
        "2: slices is 'a'; expected a list of 1 to 1000 slices, each with `sources`.",
    ),
    "a slice text": (
        "merge_method: linear\nslices: [a]",
        "2: slices[0] is 'a'; expected a mapping with `sources`.",
    ),
    "a slice without sources": (
        "merge_method: linear\nslices: [{}]",
        "2: slices[0].sources is missing; expected a list of models, each with its layer_range.",
    ),
    "sources empty": (
        "merge_method: linear\nslices: [{sources: []}]",
        "2: slices[0].sources is a list of 0; expected a list of 1 to 1000 models.",
    ),
    "a source text": (
        "merge_method: linear\nslices: [{sources: [a]}]",
        "2: slices[0].sources[0] is 'a'; expected a mapping with `model`, `layer_range` and optionally `parameters`.",
    ),
    "no layers": (
        "merge_method: linear\nslices: [{sources: [{model: a}]}]",
        "2: slices[0].sources[0].layer_range is missing; expected [first, end), whole numbers with 0 <= first < end.",
    ),
    "layers end before they begin": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 3]}]}]",
        "2: slices[0].sources[0].layer_range is [3, 3]; expected [first, end), whole numbers with 0 <= first < end.",
    ),
    "layers below 0": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [-1, 3]}]}]",
        "2: slices[0].sources[0].layer_range is [-1, 3]; expected [first, end), whole numbers with 0 <= first < end.",
    ),
    "three ends of layers": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1, 2]}]}]",
        "2: slices[0].sources[0].layer_range is [0, 1, 2]; expected [first, end), whole numbers with 0 <= first < end.",
    ),
    "half a layer": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0.5, 1]}]}]",
        "2: slices[0].sources[0].layer_range is [0.5, 1]; expected [first, end), whole numbers with 0 <= first < end.",
    ),
    "layers a number": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: 3}]}]",
        "2: slices[0].sources[0].layer_range is 3; expected [first, end), whole numbers with 0 <= first < end.",
    ),
    "sources of unequal depth": (
        "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n  - {model: b, layer_range: [0, 3]}",
        "5: slices[0] takes 3 layers of b and 4 of a; expected the same number from each source. Change a layer_range.",
    ),
    "an option beside sources": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}], weight: 2}]",
        "2: slices[0] has the unknown key 'weight'. It is an option of linear: write it under slices[0].parameters.",
    ),
    "a key of a source misspelt": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1], parametres: {}}]}]",
        "2: slices[0].sources[0] has the unknown key 'parametres'. Did you mean parameters?",
    ),
    "sources of two methods": (
        "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0, 1], merge_method: linear}\n  - {model: a, layer_range: [1, 2], merge_method: karcher}",
        "5: slices[0].sources[1].merge_method is karcher, and the slice's is linear; expected one method. Remove one.",
    ),
    "slices of two methods and none above": (
        "slices:\n- {merge_method: linear, sources: [{model: a, layer_range: [0, 1]}]}\n- {merge_method: karcher, sources: [{model: a, layer_range: [1, 2]}]}",
        "1: merge_method is missing. `alnico methods` lists all methods.",
    ),
    "too many sources": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n- sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}]",
        "4: slices[1].sources: passthrough merges 1 model; found 2. Remove models.",
    ),
    "a base in one slice only": (
        "merge_method: ties\nslices:\n- {base_model: b, sources: [{model: a, layer_range: [0, 1]}]}\n- {sources: [{model: a, layer_range: [1, 2]}]}",
        "1: ties needs base_model, the model that the others were fine-tuned from. Add base_model: PATH.",
    ),
    "shared option of a slice differs": (
        "merge_method: slerp\nbase_model: a\nslices:\n- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1], parameters: {t: 0.4}}]\n  parameters: {t: [0, 1]}",
        "4: t must have one value for all models of a slice or module, but it differs (slices[0].sources[1]: 0.4, slices[0].parameters: [0, 1]). Set it once, under parameters.",
    ),
    "modules empty": (
        "merge_method: linear\nmodules: {}",
        "2: modules is an empty mapping; expected a mapping of module names to models or slices.",
    ),
    "modules a list": (
        "merge_method: linear\nmodules: [a]",
        "2: modules is a list; expected a mapping of module names to models or slices.",
    ),
    "a module text": (
        "merge_method: linear\nmodules: {text_decoder: a}",
        "2: modules.text_decoder is 'a'; expected a mapping with `models` or `slices`.",
    ),
    "a module of nothing": (
        "merge_method: linear\nmodules: {text_decoder: {parameters: {}}}",
        "2: modules.text_decoder.models is missing; expected a list of models.",
    ),
    "a module of both": (
        "merge_method: linear\nmodules:\n  text_decoder:\n    models: [a]\n    slices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
        "5: modules.text_decoder: models and slices are both present; expected one of models and slices. Remove one.",
    ),
    "an option of a module's method": (
        "merge_method: linear\nmodules: {text_decoder: {merge_method: ties, models: [a], parameters: {densty: 1}}}\nbase_model: b",
        "2: modules.text_decoder.parameters.densty is not an option of ties. Did you mean density?",
    ),
    "rules text": (
        "merge_method: linear\nmodels: [a]\nmethods: mlp",
        "3: methods is 'mlp'; expected a list of mappings with `filter` and `merge_method`.",
    ),
    "a rule text": (
        "merge_method: linear\nmodels: [a]\nmethods: [mlp]",
        "3: methods[0] is 'mlp'; expected a mapping with `filter` and `merge_method`.",
    ),
    "a rule without a filter": (
        "merge_method: linear\nmodels: [a]\nmethods: [{merge_method: linear}]",
        "3: methods[0].filter is missing; expected the tensors: part of a name, = and the whole name, re: and a regular expression, block: and blocks of an image model, or * for all.",
    ),
    "a rule without a method": (
        "merge_method: linear\nmodels: [a]\nmethods: [{filter: mlp}]",
        "3: methods[0].merge_method is missing; expected the method of these tensors; drop leaves them out of the output.",
    ),
    "an option beside a filter": (
        "merge_method: linear\nbase_model: b\nmodels: [a]\nmethods: [{filter: mlp, merge_method: ties, density: 1}]",
        "4: methods[0] has the unknown key 'density'. It is an option of ties: write it under methods[0].parameters.",
    ),
    "a rule that needs a base": (
        "merge_method: linear\nmodels: [a]\nmethods:\n- {filter: mlp, merge_method: ties}",
        "4: methods[0]: ties needs base_model, the model that the others were fine-tuned from. Add base_model: PATH.",
    ),
    "a rule that needs an option": (
        "merge_method: linear\nbase_model: a\nmodels: [a, b]\nmethods: [{filter: mlp, merge_method: slerp}]",
        "4: methods[0]: slerp needs the option t: the place on the arc, any number. Set it under methods[0].parameters.",
    ),
    "a rule for one model among several": (
        "merge_method: linear\nmodels: [a, b]\nmethods: [{filter: mlp, merge_method: passthrough}]",
        "3: methods[0]: passthrough takes one model, but there are several. Add model: base, or another model.",
    ),
    "a rule for too many models": (
        "merge_method: linear\nbase_model: c\nmodels: [a, b]\nmethods: [{filter: mlp, merge_method: slerp, parameters: {t: 1}}]",
        "4: methods[0]: slerp merges 2 models, base_model one of them; found 3. For two models and a base that is neither of them, use nuslerp. Or name the models of this rule under methods[0].models.",
    ),
    "a rule of several models with one": (
        "merge_method: linear\nmodels: [a, b]\nmethods: [{filter: mlp, merge_method: karcher, model: a}]",
        "3: methods[0].model is for methods of one model, but karcher merges several. Remove it, or use passthrough.",
    ),
    "a rule with a base that is not there": (
        "merge_method: linear\nmodels: [a, b]\nmethods: [{filter: mlp, merge_method: passthrough, model: base}]",
        "3: methods[0].model is base, but there is no base_model. Add base_model: PATH.",
    ),
    "a rule with too many values": (
        "merge_method: linear\nbase_model: a\nmodels: [a, b, c]\nmethods: [{filter: mlp, merge_method: ties, parameters: {density: [1, 1, 1]}}]",
        "4: methods[0].parameters.density has 3 values, but there are 2 models besides base_model; expected one per model.",
    ),
    "a rule with a value out of range": (
        "merge_method: linear\nbase_model: a\nmodels: [a, b, c]\nmethods: [{filter: mlp, merge_method: ties, parameters: {density: [1, 1.4]}}]",
        "4: methods[0].parameters.density[1] is 1.4; density is the share of each tensor's entries that is kept, in (0, 1]. Did you mean 0.14?",
    ),
    "a rule whose method refuses its options": (
        "merge_method: linear\nmodels: [a, b]\nmethods: [{filter: mlp, merge_method: karcher, parameters: {weight: [1, -1]}}]",
        "3: methods[0]: the weights sum to 0 (1, -1), so they cannot be normalised; expected a sum other than 0. Change a weight.",
    ),
    "a filter empty": (
        "merge_method: linear\nmodels: [a]\nmethods: [{filter: '', merge_method: linear}]",
        "3: methods[0].filter is ''; expected part of a tensor's name, or * for all.",
    ),
    "a filter of nothing exactly": (
        "merge_method: linear\nmodels: [a]\nmethods: [{filter: '=', merge_method: linear}]",
        "3: methods[0].filter is '='; expected part of a tensor's name, or * for all.",
    ),
    "a filter that is no expression": (
        "merge_method: linear\nmodels: [a]\nmethods: [{filter: 're:(', merge_method: linear}]",
        "3: methods[0].filter is 're:(', which is not a regular expression (missing ), unterminated subpattern at position 0). Correct it.",
    ),
    "a filter a number": (
        "merge_method: linear\nmodels: [a]\nparameters: {weight: {filter: 3, value: 1}}",
        "3: parameters.weight.filter is 3; expected text. Put it in quotes.",
    ),
    "a filter without a value": (
        "merge_method: linear\nmodels: [a]\nparameters: {weight: [{filter: mlp}, 1]}",
        "3: parameters.weight[0] has a filter without a value; expected both. Add value.",
    ),
    "a key of a filter misspelt": (
        "merge_method: linear\nmodels: [a]\nparameters: {weight: {filter: mlp, value: 1, wert: 2}}",
        "3: parameters.weight has the unknown key 'wert'. Valid names: filter, value.",
    ),
    "a value before filters": (
        "merge_method: linear\nmodels: [a]\nparameters: {weight: [1, {filter: mlp, value: 2}]}",
        "3: parameters.weight[0] is 1 before other filters and would override them; expected filter and value. Move it to the end.",
    ),
    "a list inside a gradient": (
        "merge_method: linear\nmodels: [a]\nparameters: {weight: [1, [2]]}",
        "3: parameters.weight[1] is a list inside a list; expected one value.",
    ),
    "a gradient with text": (
        "merge_method: linear\nmodels: [a]\nparameters: {weight: [1, heavy]}",
        "3: parameters.weight[1] is 'heavy'; expected a number.",
    ),
    "a truth in a gradient": (
        "merge_method: linear\nmodels: [a]\nparameters: {normalize: [true, 2]}",
        "3: parameters.normalize[1] is 2; expected true or false.",
    ),
    "a value wrong for one of two methods": (
        "merge_method: task_arithmetic\nbase_model: c\nmodels: [a, b]\nparameters: {divide: count}\nmethods: [{filter: mlp, merge_method: ties}]",
        "4: parameters.divide is 'count'; expected one of weight, none (as task_arithmetic has it).",
    ),
    "an option of none of two methods": (
        "merge_method: linear\nbase_model: a\nmodels: [a, b]\nparameters: {gama: 1}\nmethods: [{filter: mlp, merge_method: slerp, parameters: {t: 1}}]",
        "4: parameters.gama is not an option of linear or slerp. Valid names: weight, normalize, t, over.",
    ),
    "lines a number": (
        "merge_method: ties\nbase_model: c\nmodels: [a]\nlines: 3",
        "4: lines is 3; expected a mapping with `alpha` and `beta`.",
    ),
    "lines without beta": (
        "merge_method: ties\nbase_model: c\nmodels: [a]\nlines: {alpha: 1}",
        "4: lines.beta is missing; expected a finite number.",
    ),
    "lines without task vectors": (
        "merge_method: linear\nmodels: [a]\nlines: {alpha: 1, beta: 1}",
        "3: lines scales merged task vectors by layer, but linear has no task vectors. Remove lines, or use a method such as task_arithmetic.",
    ),
    "protect a number": (
        "merge_method: linear\nmodels: [a]\nbase_model: a\nprotect: 3",
        "4: protect is 3; expected a mapping with `gram` and optionally `energy`, `model` and `others`.",
    ),
    "protect without gram": (
        "merge_method: linear\nmodels: [a]\nbase_model: a\nprotect: {energy: 0.9}",
        "4: protect.gram is missing; expected the directory that `alnico statistics gram` wrote for the protected model.",
    ),
    "protect more than all": (
        "merge_method: linear\nmodels: [a]\nbase_model: a\nprotect: {gram: g, energy: 99}",
        "4: protect.energy is 99; expected the share of the inputs' squares that is kept, in (0, 1].",
    ),
    "protect other tensors of the base": (
        "merge_method: linear\nmodels: [a]\nbase_model: a\nprotect: {gram: g, others: base}",
        "4: protect.others is 'base'; expected keep or merge.",
    ),
    "protect without a model": (
        "merge_method: linear\nmodels: [a, b]\nprotect: {gram: g}",
        "3: protect keeps what the base gives, but there is no base_model; expected the model that must not change. Add model: PATH under protect, or base_model.",
    ),
    "protect slices": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]\nbase_model: a\nprotect: {gram: g}",
        "4: protect is for models that are merged whole; found slices. Merge these first, and protect in a second stage.",
    ),
    "dtype of whole numbers": (
        "merge_method: linear\nmodels: [a]\ndtype: torch.int64",
        "3: dtype is 'torch.int64'; expected bfloat16, float16, float32 or float64. It would round weights to integers; integer buffers keep their dtype anyway.",
    ),
    "a path with a sign": (
        "merge_method: linear\nmodels: [{model: {path: a@b, revision: c}}]",
        "2: models[0].model.path is 'a@b'; expected text without @ and +. Rename it or create a link.",
    ),
    "a model with a sign": (
        "merge_method: linear\nmodels: [{model: {model: a+b, lora: c}}]",
        "2: models[0].model.model is 'a+b'; expected a path without +. Rename it or create a link.",
    ),
    "a revision without a path": (
        "merge_method: linear\nmodels: [{model: {revision: c}}]",
        "2: models[0].model.path is missing; expected the path of a model.",
    ),
    "an adapter without a model": (
        "merge_method: linear\nmodels: [{model: {lora: c}}]",
        "2: models[0].model is a mapping without model; expected model, or path, as in {path: a, revision: b}.",
    ),
    "a key of a reference misspelt": (
        "merge_method: linear\nmodels: [{model: {model: a, lroa: c}}]",
        "2: models[0].model has the unknown key 'lroa'. Did you mean lora?",
    ),
    "tokenizer text": (
        "merge_method: linear\nmodels: [a]\ntokenizer: union",
        "3: tokenizer is 'union'; expected a mapping with `source`. Did you mean tokenizer_source: union?",
    ),
    "tokenizer twice": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {source: union}\ntokenizer_source: base",
        "4: tokenizer and tokenizer_source are both present; expected one. Remove tokenizer_source.",
    ),
    "a key of the tokenizer misspelt": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {sorce: union}",
        "3: tokenizer has the unknown key 'sorce'. Did you mean source?",
    ),
    "tokens a list": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {tokens: [<s>]}",
        "3: tokenizer.tokens is a list; expected a mapping of tokens to `source` and `force`.",
    ),
    "a token text": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {<s>: a}}",
        "3: tokenizer.tokens.<s> is 'a'; expected a mapping with `source` and optionally `force`.",
    ),
    "padding to nothing": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {pad_to_multiple_of: 0}",
        "3: tokenizer.pad_to_multiple_of is 0; expected a whole number of at least 1.",
    ),
    "force a number": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {<s>: {source: a, force: 2}}}",
        "3: tokenizer.tokens.<s>.force is 2; expected true or false.",
    ),
    "a token of an unknown kind": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {<s>: {source: {kind: mean}}}}",
        "3: tokenizer.tokens.<s>.source.kind is 'mean'; expected model_token or zero.",
    ),
    "a token of a model without its name": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {<s>: {source: {kind: model_token, model: a}}}}",
        "3: tokenizer.tokens.<s>.source has none of token and token_id; expected one.",
    ),
    "a token of a model twice": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {<s>: {source: {kind: model_token, model: a, token: x, token_id: 1}}}}",
        "3: tokenizer.tokens.<s>.source has both of token and token_id; expected one.",
    ),
    "a token a number": (
        "merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {<s>: {source: {kind: model_token, model: a, token: 1}}}}",
        "3: tokenizer.tokens.<s>.source.token is 1; expected text. Put it in quotes.",
    ),
    "chat_template a number": (
        "merge_method: linear\nmodels: [a]\nchat_template: 3",
        "3: chat_template is 3; expected text. Put it in quotes.",
    ),
    "chat_template blank": (
        "merge_method: linear\nmodels: [a]\nchat_template: '  '",
        "3: chat_template is '  '; expected text.",
    ),
    "name a number": (
        "merge_method: linear\nmodels: [a]\nname: 3",
        "3: name is 3; expected text. Put it in quotes.",
    ),
}


@pytest.mark.parametrize(("text", "expected"), LANGUAGE.values(), ids=LANGUAGE.keys())
def test_what_is_wrong_has_one_message_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yml")
    assert str(caught.value) == f"recipe.yml:{expected}"
