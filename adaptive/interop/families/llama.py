"""Llama 1 to 3 and what is built like them: SmolLM, SmolLM2, TinyLlama, Yi, DeepSeek-LLM."""

from adaptive.interop.llama_family import USUAL, LlamaLike


class Llama(LlamaLike):
    architecture, model_type = "LlamaForCausalLM", "llama"
    defaults = USUAL | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    }  # fmt: skip


FAMILY = Llama()
