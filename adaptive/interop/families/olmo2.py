"""OLMo 2: norms behind attention and feed-forward, and of all queries and all keys of a position together."""

from adaptive.interop.llama_family import USUAL, LlamaLike

_NORMS = {
    "mixer_out_norm": "post_attention_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}


class Olmo2(LlamaLike):
    architecture, model_type = "Olmo2ForCausalLM", "olmo2"
    defaults = USUAL | {
        "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "rms_norm_eps": 1e-5, "pad_token_id": 1,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    norms_at, qk_norm = "output", "full"
    norms = _NORMS


FAMILY = Olmo2()
