"""Names stored tensors that only a running quantised model uses: scales of activations, markers."""

from __future__ import annotations

ENDS = (
    ".activation_scale", "_activation_scale", ".input_scale", "_input_scale", ".input_scale_ub", ".input_zero_point", ".input_global_scale",
    ".input_g_idx", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point",
    ".prob_output_scale", ".scale_input", ".comfy_quant", "scaled_fp8", ".weight_format",
)  # fmt: skip
"""Ends of their names."""


def is_left_out(name: str) -> bool:
    """Does nothing but a quantised model need a tensor?"""
    return name.endswith(ENDS)
