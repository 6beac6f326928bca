"""Mistral: Llama with a window in every layer."""

import dataclasses
from typing import Any

from adaptive.interop.fields import Fields
from adaptive.interop.llama_family import FULL, SLIDING, USUAL, LlamaLike, layer_types, window
from adaptive.layers.block import Settings as Block
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model


class Mistral(LlamaLike):
    architecture, model_type = "MistralForCausalLM", "mistral"
    defaults = USUAL | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096,
        "max_position_embeddings": 131072,
    }  # fmt: skip

    def bias(self, fields: Fields) -> Any:
        fields.only("attention_bias", False, None)
        return "none"

    def of_layer(self, usual: Attention, fields: Fields, i: int, layers: int) -> Attention:
        size = window(fields)
        only = layer_types(fields, layers, [SLIDING if size else FULL] * layers)
        if len(set(only)) > 1:
            raise fields.wrong("layer_types", "the library's Mistral has one kind of attention in all layers")
        return dataclasses.replace(usual, window=size)

    def more(self, settings: language_model.Settings, blocks: list[Block], attention: Attention) -> dict[str, Any]:
        return {"sliding_window": attention.window or None}


FAMILY = Mistral()
