"""Mixtral: experts in every layer, weighted among those that were chosen."""

from adaptive.interop.hf_moe import Routed

FAMILY = Routed("mixtral", "MixtralForCausalLM")
