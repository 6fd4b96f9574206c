"""Recipes that are right: the forms seen in circulation, and every part of the language."""

from __future__ import annotations

GOOD = {
    "weights that follow from norms": """\
merge_method: ties
base_model: base
models:
  - a
  - model: b
    parameters: {weight: 0.5}
  - c
parameters:
  weight:
    - filter: mlp
      value: {from: l2_norm, mode: power, alpha: 1e0, per: layer, scale: -0.5}
    - filter: norm
      value: 0
    - {from: analysis, path: report/, mode: linear, per: tensor}
methods:
  - filter: embed
    merge_method: linear
    parameters: {weight: {from: l2_norm, beta: 0}}
""",
    "weights that follow a schedule": """\
merge_method: linear
models: [a, b, c]
parameters:
  weight:
    - filter: norm
      value: {from: schedule, shape: [1, 5e-1, 0.25]}
    - filter: mlp
      value: {from: schedule, shape: ema, decay: 0.9}
    - {from: schedule, shape: 1-sqrt}
methods:
  - filter: embed
    merge_method: task_arithmetic
    base_model: a
    parameters: {weight: {from: schedule}}
""",
    "linear over slices, the method inside": """\
slices:
  - sources:
      - model: a
        layer_range: [0, 32]
      - model: b
        layer_range: [0, 32]
    merge_method: linear
merge_method: linear
parameters:
  weight: 0.5
dtype: float16
""",
    "linear over slices, the method inside only": """\
slices:
- sources:
  - {model: a, layer_range: [0, 32]}
  - {model: b, layer_range: [0, 32], merge_method: linear}
parameters: {weight: 0.5}
""",
    "slerp over slices": """\
slices:
  - sources:
      - model: a
        layer_range: [0, 32]
      - model: b
        layer_range: [0, 32]
merge_method: slerp
base_model: a
parameters:
  t: 0.5
dtype: bfloat16
""",
    "slerp over slices, base not among them": """\
slices:
  - sources: [{model: b, layer_range: [0, 32]}]
merge_method: slerp
base_model: a
parameters: {t: 0.5}
""",
    "slerp over models, t under each": """\
models:
  - model: a
    parameters:
      t: 0.5
  - model: b
    parameters:
      t: 0.5
merge_method: slerp
base_model: a
""",
    "slerp with gradients by filter": """\
models: [a, b]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
""",
    "ties": """\
models:
  - model: base
  - model: a
    parameters:
      density: 0.5
      weight: 0.5
  - model: b
    parameters:
      density: [1, 0.7, 0.1]
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  weight: 1.0
  density: 5e-1
  int8_mask: true
dtype: float16
""",
    "dare_ties": """\
models:
  - model: base
    # no parameters necessary for the base
  - {model: a, parameters: {density: 0.53, weight: 0.4}}
  - {model: b, parameters: {density: 0.53, weight: 0.3}}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true, normalize: true}
dtype: bfloat16
""",
    "passthrough of two": """\
slices:
  - sources:
    - model: a
      layer_range: [0, 16]
  - sources:
    - model: b
      layer_range: [16, 32]
merge_method: passthrough
dtype: float16
""",
    "passthrough that repeats": """\
slices:
  - sources: [{model: a, layer_range: [0, 18]}]
  - sources:
    - model: a
      layer_range: [15, 18]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
  - sources: [{model: a, layer_range: [18, 24]}]
merge_method: passthrough
""",
    "several, without names": """\
merge_method: linear
models: [a, b]
---
merge_method: ties
base_model: a
models: [b, c]
---
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
""",
    "several, as stages": """\
name: first
merge_method: linear
models: [a, b]
---
name: second
merge_method: slerp
base_model: first
models: [first, c]
parameters: {t: 0.5}
""",
    "rules": """\
merge_method: linear
base_model: base
models: [a, b]
parameters: {weight: [0, 1e-5, "1"]}
methods:
  - filter: mlp
    merge_method: ties
    parameters:
      density: [0.3, 0.2]
      lambda: [1, 0.5]
      weight: [{filter: up, value: [1, 2]}, {filter: "re:down.*[02]$", value: 3}, 1]
  - filter: "=model.embed_tokens.weight"
    merge_method: passthrough
    model: base
  - {filter: lm_head, merge_method: passthrough, model: {path: c, revision: main}}
""",
    "rules with their own models": """\
merge_method: linear
models: [a, b]
methods:
  - filter: fc1
    merge_method: slerp
    models: [b, {model: c, parameters: {t: 0.3}}]
  - filter: fc2
    merge_method: ties
    preset: paper
    base_model: {path: base, revision: main}
    models: [{model: a, parameters: {weight: [1, 2]}}, c, {model: {model: d, lora: adapter}}]
    parameters: {density: [0.3, 0.2, 0.1]}
  - {filter: fc3, merge_method: nuslerp, models: [a, c], base_model: null}
""",
    "slices with everything": """\
merge_method: linear
base_model: base
parameters: {weight: {filter: mlp, value: [0, 1]}, normalize: [true, false]}
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {weight: 0.25}}
      - {model: a, layer_range: [4, 8], parameters: {weight: [{filter: attn, value: [1, 2]}, 3]}}
    residual_weight: 0.5
  - sources:
      - {model: a, layer_range: [8, 9]}
      - {model: b, layer_range: [3, 4]}
    merge_method: dare_ties
    base_model: other
    parameters: {density: {value: 0.5}, lambda: 2, rescale: [inverse, none]}
""",
    "modules": """\
merge_method: passthrough
base_model: base
modules:
  text_decoder:
    slices:
      - sources: [{model: a, layer_range: [0, 4]}]
      - sources: [{model: a, layer_range: [2, 6]}]
  vision_tower:
    merge_method: ties
    parameters: {density: 0.5, scale: 2}
    models:
      - a
      - model: {model: {path: b, revision: main}, lora: {path: c}, override_architecture: X}
        parameters: {weight: [0.1, 0.2]}
""",
    "vocabulary": """\
merge_method: task_arithmetic
base_model: {path: org/base, revision: v1}
models: [a, {model: b+c@d}]
lines: {alpha: 0.2, beta: 8e-1}
protect: {model: {path: c, revision: v2}, gram: stats/c, energy: 9e-1, others: merge}
dtype: float32
out_dtype: torch.float64
missing: copy
unrelated: allow
seed: -3
name: everything else
chat_template: |
  {% for message in messages %}
  {{ message.content }}{% endfor %}
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>: {source: a}
    <|zero|>: {source: {kind: zero}, force: true}
    <|by_id|>: {source: {kind: model_token, model: a, token_id: 3}}
    <|by_name|>:
      source:
        kind: model_token
        model: {model: {path: b}}
        token: <s>
    <|left|>: {force: false}
""",
    "vocabulary of one": """\
merge_method: linear
models: [a, b]
tokenizer_source: base
chat_template: auto
""",
}
