"""Qwen2 and Qwen2.5: biases of queries, keys and values, and a window in the upper layers where it is switched on."""

import dataclasses
from typing import Any

from adaptive.interop.fields import Fields
from adaptive.interop.llama_family import FULL, SLIDING, USUAL, LlamaLike, layer_types, types_of, window
from adaptive.layers.block import Settings as Block
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model


class Qwen2(LlamaLike):
    architecture, model_type = "Qwen2ForCausalLM", "qwen2"
    defaults = USUAL | {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "sliding_window": 4096,
        "max_window_layers": 28, "max_position_embeddings": 32768,
    }  # fmt: skip

    def bias(self, fields: Fields) -> Any:
        fields.get("attention_bias")  # the library has no such field for it
        return "qkv"

    def of_layer(self, usual: Attention, fields: Fields, i: int, layers: int) -> Attention:
        size = window(fields) if fields.boolean("use_sliding_window") else 0
        upper = fields.integer("max_window_layers", least=0)
        types = layer_types(fields, layers, [SLIDING if size and n >= upper else FULL for n in range(layers)])
        return dataclasses.replace(usual, window=size if types[i] == SLIDING else 0)

    def more(self, settings: language_model.Settings, blocks: list[Block], attention: Attention) -> dict[str, Any]:
        about = types_of(blocks)
        return {"use_sliding_window": about["sliding_window"] is not None, **about}


FAMILY = Qwen2()
