"""Gemma 3, text alone: norms on both sides whose weights count from one, windows in five layers of six, each kind of
layer with a base of its own, scaled embeddings and GeGLU."""

import dataclasses
from typing import Any, Literal

from adaptive.errors import RecipeError
from adaptive.interop.fields import Fields
from adaptive.interop.llama_family import FULL, SLIDING, USUAL, LlamaLike, layer_types, types_of, window
from adaptive.interop.rotary import rope_fields, rotary
from adaptive.layers.block import Settings as Block
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model

_NORMS = {
    "mixer_norm": "input_layernorm",
    "mixer_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}


class Gemma3(LlamaLike):
    architecture, model_type = "Gemma3ForCausalLM", "gemma3_text"
    defaults = USUAL | {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "pad_token_id": 0,
        "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    }  # fmt: skip
    norms_at, norm_offset = "both", 1.0
    qk_norm: Literal["none", "head", "full"] = "head"
    norms = _NORMS
    act = ("hidden_activation", ("gelu_pytorch_tanh",), "gelu_tanh")

    def check(self, fields: Fields) -> None:
        super().check(fields)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            fields.only(name, None)
        fields.only("use_bidirectional_attention", False, None)

    def attention(self, fields: Fields, width: int) -> Attention:
        heads = fields.integer("num_attention_heads")
        theta, scaling = rotary(fields, FULL)
        return Attention(
            heads=heads,
            kv_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim"),
            rope_theta=theta,
            rope_scaling=scaling,
            bias=self.bias(fields),
            qk_norm=self.qk_norm,
            scale=fields.number("query_pre_attn_scalar") ** -0.5,
        )

    def of_layer(self, usual: Attention, fields: Fields, i: int, layers: int) -> Attention:
        step = fields.integer("sliding_window_pattern") if fields.given("sliding_window_pattern") else 6
        types = layer_types(fields, layers, [SLIDING if (n + 1) % step else FULL for n in range(layers)])
        if types[i] == FULL:
            return usual
        per_type = fields.given("rope_parameters")
        local = (per_type or {}).get(SLIDING) if isinstance(per_type, dict) else None
        theta = (local or {}).get("rope_theta", fields.number("rope_local_base_freq"))
        if (local or {}).get("rope_type", "default") != "default":
            raise fields.wrong("rope_parameters", f"of {SLIDING} only rope_type=default is supported")
        return dataclasses.replace(usual, window=window(fields), rope_theta=float(theta), rope_scaling=None)

    def language(self, fields: Fields, width: int) -> dict[str, Any]:
        return {"embedding_scale": width**0.5}

    def more(self, settings: language_model.Settings, blocks: list[Block], attention: Attention) -> dict[str, Any]:
        mixers = [block.mixer for block in blocks if isinstance(block.mixer, Attention)]
        if not attention.scale:
            raise RecipeError("has a scale of its scores (scale)")
        full, local = ([m for m in mixers if bool(m.window) == slides] for slides in (False, True))
        about = types_of(blocks) | {"query_pre_attn_scalar": round(attention.scale**-2, 6)}
        if full:
            about |= rope_fields(full[0].rope_theta, full[0].rope_scaling)
        return about | {"rope_local_base_freq": local[0].rope_theta if local else 1e4}


FAMILY = Gemma3()
