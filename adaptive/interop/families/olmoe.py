"""OLMoE: many small experts, norms of queries and keys over the whole width."""

from adaptive.interop.hf_moe import Routed

FAMILY = Routed("olmoe", "OlmoeForCausalLM")
