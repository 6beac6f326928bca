"""Gemma 2: as Gemma 3, without norms of queries and keys, with soft caps of scores and of logits, and a window in every
second layer."""

import dataclasses
from typing import Any

from adaptive.interop.families.gemma3 import Gemma3
from adaptive.interop.fields import Fields
from adaptive.interop.llama_family import FULL, SLIDING, LlamaLike, layer_types, types_of, window
from adaptive.interop.rotary import rope_fields
from adaptive.layers.block import Settings as Block
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model


class Gemma2(Gemma3):
    architecture, model_type = "Gemma2ForCausalLM", "gemma2"
    defaults = Gemma3.defaults | {
        "vocab_size": 256000, "rope_theta": 1e4, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    qk_norm = "none"

    def check(self, fields: Fields) -> None:
        LlamaLike.check(self, fields)
        fields.only("use_bidirectional_attention", None, False)

    def attention(self, fields: Fields, width: int) -> Attention:
        usual = LlamaLike.attention(self, fields, width)
        cap = fields.number("attn_logit_softcapping") if fields.get("attn_logit_softcapping") else 0.0
        return dataclasses.replace(usual, scale=fields.number("query_pre_attn_scalar") ** -0.5, soft_cap=cap)

    def of_layer(self, usual: Attention, fields: Fields, i: int, layers: int) -> Attention:
        types = layer_types(fields, layers, [SLIDING if (n + 1) % 2 else FULL for n in range(layers)])
        return dataclasses.replace(usual, window=window(fields) if types[i] == SLIDING else 0)

    def language(self, fields: Fields, width: int) -> dict[str, Any]:
        cap = fields.number("final_logit_softcapping") if fields.get("final_logit_softcapping") else 0.0
        return super().language(fields, width) | {"logit_soft_cap": cap}

    def more(self, settings: language_model.Settings, blocks: list[Block], attention: Attention) -> dict[str, Any]:
        about = types_of(blocks) | rope_fields(attention.rope_theta, attention.rope_scaling)
        return about | {
            "query_pre_attn_scalar": round((attention.scale or attention.head_dim**-0.5) ** -2, 6),
            "attn_logit_softcapping": attention.soft_cap or None,
            "final_logit_softcapping": settings.logit_soft_cap or None,
        }


FAMILY = Gemma2()
