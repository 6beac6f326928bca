"""Qwen3: norms of queries and keys in place of biases."""

from typing import Any

from adaptive.interop.families.qwen2 import Qwen2
from adaptive.interop.fields import Fields
from adaptive.interop.llama_family import LlamaLike


class Qwen3(Qwen2):
    architecture, model_type = "Qwen3ForCausalLM", "qwen3"
    defaults = Qwen2.defaults | {"head_dim": 128}
    qk_norm = "head"

    def bias(self, fields: Fields) -> Any:
        return LlamaLike.bias(self, fields)


FAMILY = Qwen3()
