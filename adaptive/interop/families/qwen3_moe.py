"""Qwen3-MoE: Qwen3 whose layers, or some of them, have experts."""

from adaptive.interop.hf_moe import Routed

FAMILY = Routed("qwen3_moe", "Qwen3MoeForCausalLM")
