"""Recipes with what recipes in circulation have and mergekit 0.1.5 ignores, or reads in its own way; written for the matrix.

Each runs in mergekit. Model names are those of the matrix: a base, three fine-tunes of it, and ``far``.
"""

from __future__ import annotations

DELTAS = """\
base_model: base
models:
- {model: base}
- {model: one, parameters: {weight: 0.9, density: 0.6}}
- {model: two, parameters: {weight: 0.5, density: 0.5}}
- {model: three, parameters: {weight: 0.3, density: 0.7}}
"""
PLAIN = """\
models:
- {model: one, parameters: {weight: 0.7}}
- {model: two, parameters: {weight: 0.4}}
"""
SPARSE = """\
base_model: base
models:
- {model: one, parameters: {weight: 0.8}}
- {model: two, parameters: {weight: 0.6}}
"""
ARC = "merge_method: slerp\nbase_model: base\n"
FAR = "base_model: base\nmodels:\n- {model: base}\n- {model: far}\n"
IDLE = "weight: 0.4, density: [0.2, 0.9], normalize: 1.0, rescale: [{filter: mlp, value: 1}, {value: 0}], lambda: 0.5"


def deltas(method: str, parameters: str, **keys: str) -> str:
    return f"merge_method: {method}\n{DELTAS}parameters: {{{parameters}}}\n" + "".join(
        f"{k}: {v}\n" for k, v in keys.items()
    )


def sparse(method: str, parameters: str) -> str:
    return f"merge_method: {method}\n{SPARSE}parameters: {{{parameters}}}\n"


TRUTHS = {
    "ties-normalize-1.0": deltas("ties", "normalize: 1.0, int8_mask: 1.0"),
    "ties-normalize-0": deltas("ties", "normalize: 0"),
    "ties-normalize-gradient": deltas("ties", "normalize: [1.0, 0.0]"),
    "ties-normalize-filters": deltas(
        "ties", "normalize: [{filter: mlp, value: 1.0}, {filter: self_attn, value: [0, 1]}, {value: 0}]"
    ),
    "ties-normalize-text": deltas("ties", 'normalize: "False", rescale: "TRUE"'),
    "ties-three-truths": deltas("ties", 'normalize: [1, "off", 1.0]'),
    "task_arithmetic-normalize-1": deltas("task_arithmetic", "normalize: 1"),
    "dare_linear-rescale-0.0": deltas("dare_linear", 'rescale: 0.0, normalize: "yes"'),
    "dare_ties-rescale-gradient": deltas("dare_ties", "rescale: [0.0, 1.0], normalize: 1.0"),
    "della-text": deltas("della", 'normalize: "no", rescale: "on", epsilon: 0.1'),
    "della_linear-off": deltas("della_linear", 'rescale: "off", normalize: "t", epsilon: 0.2'),
    "breadcrumbs-numbers": deltas("breadcrumbs", "normalize: 1, rescale: 1.0, gamma: 0.05"),
    "breadcrumbs_ties-filter": deltas("breadcrumbs_ties", "normalize: {filter: mlp, value: 1.0}, gamma: 0.1"),
    "linear-normalize-0": f"merge_method: linear\n{PLAIN}parameters: {{normalize: 0}}\n",
    "nuslerp-column-by-column": f"merge_method: nuslerp\n{PLAIN}parameters: {{nuslerp_flatten: 0.0, nuslerp_row_wise: 0}}\n",
    "nuslerp-row-by-row": f'merge_method: nuslerp\n{PLAIN}parameters: {{nuslerp_flatten: "false", nuslerp_row_wise: 1.0}}\n',
    "nuslerp-flat": f"merge_method: nuslerp\nbase_model: base\n{PLAIN}parameters: {{nuslerp_flatten: 1.0}}\n",
    "multislerp-weights": f"merge_method: multislerp\nbase_model: base\n{PLAIN}parameters: {{normalize_weights: 0.0, eps: 1e-8}}\n",
    "model_stock-by-rows": "merge_method: model_stock\nbase_model: base\nmodels: [{model: one}, {model: two}]\nparameters: {filter_wise: 1.0}\n",
    "as-mergekit-evolve-writes-it": """\
base_model: base
dtype: float32
merge_method: task_arithmetic
allow_negative_weights: true
parameters: {int8_mask: 1.0, normalize: 1.0}
slices:
- sources:
  - {layer_range: [0, 1], model: one, parameters: {weight: 1}}
  - {layer_range: [0, 1], model: two, parameters: {weight: 0.3475}}
  - {layer_range: [0, 1], model: base}
- sources:
  - {layer_range: [1, 3], model: one, parameters: {weight: 0.8971}}
  - {layer_range: [1, 3], model: two, parameters: {weight: -0.2}}
  - {layer_range: [1, 3], model: base}
""",
    "truths-at-every-level": """\
merge_method: ties
base_model: base
modules:
  default:
    slices:
    - sources:
      - {layer_range: [0, 2], model: base}
      - {layer_range: [0, 2], model: one, parameters: {weight: 0.8}}
      - {layer_range: [0, 2], model: two, parameters: {weight: 0.5}}
      parameters: {normalize: 0.0}
    - sources:
      - {layer_range: [1, 3], model: base}
      - {layer_range: [1, 3], model: one, parameters: {weight: 0.2}}
      - {layer_range: [1, 3], model: two, parameters: {weight: 0.7}}
      parameters: {rescale: [{filter: mlp, value: 1}, {value: "no"}]}
    parameters: {density: 0.5}
parameters: {normalize: 1.0, rescale: 0}
""",
}

IDLE_OPTIONS = {
    "sce-of-all-options": deltas(
        "sce", f"{IDLE}, select_topk: 0.4, filter_wise: false, smooth: false, allow_negative_weights: false"
    ),
    "sce-normalize": deltas("sce", "normalize: true, select_topk: 0.5"),
    "slerp-weights": f"""{ARC}\
models:
- {{model: base, parameters: {{weight: 0.3}}}}
- {{model: far, parameters: {{weight: [0.2, 1.0], density: 0.4}}}}
parameters: {{t: 0.4}}
""",
    "slerp-of-all-options": f"{ARC}models: [{{model: base}}, {{model: far}}]\nparameters: {{t: [0.1, 0.9], {IDLE}, embed_slerp: true}}\n",
    "slerp-text": f'{ARC}models: [{{model: base}}, {{model: far}}]\nparameters: {{t: ["0", "1e-1", 0.5], normalize: "true"}}\n',
    "multislerp-normalize": f"merge_method: multislerp\nbase_model: base\n{PLAIN}parameters: {{normalize: true}}\nint8_mask: true\n",
    "model_stock-weights": """\
merge_method: model_stock
base_model: base
models:
- {model: one, parameters: {weight: [{filter: mlp, value: [2, 1]}, {value: 1}]}}
- {model: two, parameters: {weight: [{filter: mlp, value: [1, 2]}, {value: 1}], density: 0.3}}
""",
    "arcee_fusion-weights": """\
merge_method: arcee_fusion
base_model: base
models:
- {model: base, parameters: {weight: [{filter: mlp, value: [1, 2]}, {value: 1}]}}
- {model: far, parameters: {weight: [{filter: lm_head, value: 1}, {value: [1, 0.5]}]}}
dtype: float64
""",
    "nearswap-weights": f"merge_method: nearswap\n{FAR.replace('far', 'one')}parameters: {{t: 0.05, {IDLE}}}\n",
    "karcher-many-steps": """\
merge_method: karcher
models: [{model: one}, {model: far}, {model: two}]
parameters: {max_iter: 20000, tol: 1e-6, normalize: true, t: 0.5}
""",
    "passthrough-options": f"merge_method: passthrough\nmodels: [{{model: one}}]\nparameters: {{scale: 0.5, t: 1, {IDLE}}}\n",
    "ram-options": deltas("ram", f"epsilon: 0.03, {IDLE}"),
    "ramplus_tl-options": deltas("ramplus_tl", f"epsilon: 0.03, r: 0.5, alpha: 1.0, {IDLE}"),
    "linear-options": f"merge_method: linear\n{PLAIN}parameters: {{density: 0.3, lambda: 2, rescale: 1.0, t: 0.1, select_topk: 0.2}}\n",
    "task_arithmetic-options": deltas(
        "task_arithmetic", "density: 0.2, rescale: true, gamma: 0.1, epsilon: 0.3, filter_wise: 1"
    ),
    "della-gamma": deltas("della", "epsilon: 0.1, gamma: 0.3, select_topk: 0.1, max_iter: 3"),
    "breadcrumbs-epsilon": deltas(
        "breadcrumbs", "gamma: 0.1, epsilon: 0.4, tol: 1e-3, nuslerp_flatten: false"
    ),
    "nuslerp-density": f"merge_method: nuslerp\n{PLAIN}parameters: {{density: 0.5, normalize: 0, lambda: 0.4, normalize_weights: false}}\n",
}

NOTHING_KEPT = {
    "ties-down-to-0": sparse("ties", "density: [1, 0.7, 0]"),
    "ties-from-0": sparse("ties", "density: [0, 0.5], rescale: true, normalize: false"),
    "dare_linear-down-to-0": sparse("dare_linear", "density: [0.8, 0.0], normalize: true"),
    "dare_ties-filter-0": sparse("dare_ties", "density: [{filter: mlp, value: 0}, {value: 0.6}]"),
    "della-down-to-0": sparse("della", "density: [0.6, 0], epsilon: 0.1"),
    "della_linear-from-0": sparse("della_linear", "density: [0, 0.6], epsilon: 0.1"),
    "breadcrumbs-down-to-0": sparse("breadcrumbs", "density: [0.7, 0.5, 0], gamma: 0.1, rescale: 1.0"),
    "breadcrumbs_ties-of-one-model": """\
merge_method: breadcrumbs_ties
base_model: base
models:
- {model: one, parameters: {weight: 0.8, density: [0.9, 0]}}
- {model: two, parameters: {weight: 0.6, density: 0.5}}
parameters: {gamma: 0.05, normalize: 1}
""",
    "sce-down-to-0": sparse("sce", "select_topk: [0.8, 0]"),
}

WRITTEN_OTHERWISE = {
    "anchors-in-a-list": """\
anchors:
- &strong 0.9
- &weak [0.1, 0.4]
merge_method: linear
models:
- {model: one, parameters: {weight: *strong}}
- {model: two, parameters: {weight: *weak}}
""",
    "anchors-of-parameters": """\
x-common: &common
  density: 0.5
  weight: 0.6
merge_method: ties
base_model: base
models:
- {model: one, parameters: *common}
- {model: two, parameters: {<<: *common, weight: 0.2}}
""",
    "anchors-under-one-name": """\
.value: &half 0.5
.value: &third [0.3, 0.6]
merge_method: task_arithmetic
base_model: base
models:
- {model: one, parameters: {weight: *half}}
- {model: two, parameters: {weight: *third}}
""",
    "anchors-of-models": """\
model_a: &a one
model: &b two
merge_method: linear
models:
- {model: *a, parameters: {weight: 0.2}}
- {model: *b, parameters: {weight: 0.7}}
""",
    "keys-of-the-command": f"out_path: ./merged\nmerge_method: linear\n{PLAIN}output_path: ./again\nrandom_seed: 7\ncuda: true\n",
    "keys-of-evolve": f"merge_method: linear\n{PLAIN}parameters: {{random_seed: 3, smooth: true, allow_negative_weights: 1}}\nsmooth: false\n",
    "empty-keys": f"merge_method: linear\nbase_model:\n{PLAIN}tokenizer_source:\nchat_template: null\nout_dtype: ~\nparameters:\n",
    "keys-given-twice": f"dtype: float32\nmerge_method: linear\nmerge_method: linear\n{PLAIN}",
    "layers-of-whole-models": """\
merge_method: slerp
base_model: base
models:
- {model: base, layer_range: [0, 3]}
- {model: far, layer_range: [0, 3], parameters: {weight: 0.5}}
parameters: {t: [0.2, 0.8]}
""",
    "layers-as-text": """\
merge_method: passthrough
slices:
- sources: [{model: one, layer_range: ["0", 2.0], parameters: {weight: 0.3}}]
- sources: [{model: two, layer_range: ["1", "3"]}]
  int8_mask: 1
""",
    "numbers-as-text": """\
merge_method: ties
base_model: base
models:
- {model: one, parameters: {weight: "0.8", density: "5e-1"}}
- {model: two, parameters: {weight: ["0.2", "0.9"], density: [0.6]}}
parameters: {lambda: "1.1", normalize: "1"}
""",
}


def circulation() -> dict[str, str]:
    """Their names and text; all in float32, if they do not say otherwise."""
    found = TRUTHS | IDLE_OPTIONS | NOTHING_KEPT | WRITTEN_OTHERWISE
    assert len(found) == sum(map(len, (TRUTHS, IDLE_OPTIONS, NOTHING_KEPT, WRITTEN_OTHERWISE)))
    return {
        name: text if "\ndtype:" in f"\n{text}" else f"{text}dtype: float32\n" for name, text in found.items()
    }
