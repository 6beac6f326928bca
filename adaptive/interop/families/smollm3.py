"""SmolLM3: Llama whose every fourth layer rotates nothing."""

import dataclasses
from typing import Any

from adaptive.interop.fields import Fields
from adaptive.interop.llama_family import FULL, SLIDING, USUAL, LlamaLike, layer_types, types_of, window
from adaptive.layers.block import Settings as Block
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model


class SmolLM3(LlamaLike):
    architecture, model_type = "SmolLM3ForCausalLM", "smollm3"
    defaults = USUAL | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "pad_token_id": 128004,
        "tie_word_embeddings": True, "no_rope_layer_interval": 4, "sliding_window": None, "rope_theta": 2e6,
        "max_position_embeddings": 32768,
    }  # fmt: skip

    def of_layer(self, usual: Attention, fields: Fields, i: int, layers: int) -> Attention:
        step = fields.integer("no_rope_layer_interval")
        rotates = fields.given("no_rope_layers")
        if rotates is None:
            rotates = [int((n + 1) % step != 0) for n in range(layers)]
        if not isinstance(rotates, list) or len(rotates) != layers or any(n not in (0, 1) for n in rotates):
            raise fields.wrong("no_rope_layers", f"must be a list of {layers}: 1 where a layer rotates, 0 where not")
        size = window(fields) if fields.boolean("use_sliding_window") else 0
        types = layer_types(fields, layers, [SLIDING if size and not rotates[n] else FULL for n in range(layers)])
        own = dataclasses.replace(usual, window=size if types[i] == SLIDING else 0)
        return own if rotates[i] else dataclasses.replace(own, rotary_dim=0)

    def more(self, settings: language_model.Settings, blocks: list[Block], attention: Attention) -> dict[str, Any]:
        about = types_of(blocks)
        rotates = [int(block.mixer.rotated > 0) for block in blocks if isinstance(block.mixer, Attention)]
        return {"no_rope_layers": rotates, "use_sliding_window": about["sliding_window"] is not None, **about}


FAMILY = SmolLM3()
