"""A model in a GGUF file under the names of Hugging Face's library: its configuration, its tensors, its tokenizer."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adaptive.errors import CheckpointError
from adaptive.interop.gguf import Gguf
from adaptive.interop.stored import Stored

# architecture -> (kind, the library's class, whether rows of queries and keys stand in the order of interleaved pairs)
_KNOWN = {
    "llama": ("llama", "LlamaForCausalLM", True),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", False),
}
_INSIDE = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_FACTORS = "rope_freqs.weight"  # by which rotations are slower, of Llama 3.1 and later
# The scaling of all of them, but for its factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Named(NamedTuple):
    """kind, configuration as a config.json, and tensors under the library's names."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Any]


def named(gguf: Gguf, where: str) -> Named:
    """The model of a file. Raises CheckpointError for an architecture that is not read here and for what is missing."""
    architecture = gguf.values.get("general.architecture")
    if architecture not in _KNOWN:
        raise CheckpointError(
            f"{where}: its architecture is {architecture!r}, known of GGUF files: {', '.join(_KNOWN)}"
        )
    kind, name, interleaved = _KNOWN[architecture]
    values = _Values(gguf.values, architecture, where)
    config = _config(values, gguf.tensors, name, kind)
    tensors = {_name(own): value for own, value in gguf.tensors.items() if own != _FACTORS}
    if interleaved:
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        for own, value in tensors.items():
            if match := re.search(r"self_attn\.([qk])_proj\.", own):
                tensors[own] = _paired(value, heads[match[1]], where)
    return Named(kind, config, tensors)


class _Values:
    def __init__(self, values: Mapping[str, Any], architecture: str, where: str):
        self._values, self._prefix, self._where = values, architecture, where

    def number(self, key: str, default: float | None = None) -> Any:
        name = f"{self._prefix}.{key}"
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self._where}: {name} is {value!r}, expected a number")
        return value

    def text(self, key: str) -> str:
        return str(self._values.get(f"{self._prefix}.{key}", "none"))

    def refuse(self, key: str, known: str) -> None:
        if (value := self.text(key)) != known:
            raise CheckpointError(f"{self._where}: {self._prefix}.{key}={value} is not read from GGUF files here")


def _config(values: _Values, tensors: Mapping[str, Stored], name: str, kind: str) -> dict[str, Any]:
    values.refuse("rope.scaling.type", "none")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or embedding.ndim != 2:
        raise CheckpointError(f"{values._where}: token_embd.weight, the embedding, is missing")
    width, heads = int(values.number("embedding_length")), int(values.number("attention.head_count"))
    dim = int(values.number("attention.key_length", width // max(heads, 1)))
    if int(values.number("rope.dimension_count", dim)) != dim:
        raise CheckpointError(f"{values._where}: rotary embeddings of a part of each head are not read from GGUF files")
    return {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": int(values.number("feed_forward_length")),
        "num_hidden_layers": int(values.number("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(values.number("attention.head_count_kv", heads)),
        "head_dim": dim,
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{values.number('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(values.number("rope.freq_base", 1e4)),
        "max_position_embeddings": int(values.number("context_length", 2048)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_scaling": _scaling(values, tensors.get(_FACTORS), dim),
    }


def _scaling(values: _Values, factors: Stored | None, dim: int) -> dict[str, Any] | None:
    """What makes a file's factors of wave lengths; None where it has none."""
    if factors is None:
        return None
    given = np.asarray(factors, np.float64)
    waves = 2 * math.pi * float(values.number("rope.freq_base", 1e4)) ** (np.arange(0, dim, 2) / dim)
    factor, low, high = given.max(), _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = _LLAMA3["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if given.shape != waves.shape or not np.allclose(given, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise CheckpointError(f"{values._where}: {_FACTORS} is no scaling of Llama 3's, and others are not read here")
    return {"rope_type": "llama3", "factor": float(f"{factor:.6g}"), **_LLAMA3}


def _name(own: str) -> str:
    """The library's name of a tensor; what has none keeps its own, and is told of as unknown."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", own):
        inside = _INSIDE.get(match[2])
        return f"model.layers.{match[1]}.{inside}.{match[3]}" if inside else own
    base, _, last = own.rpartition(".")
    return f"{_OUTSIDE[base]}.{last}" if base in _OUTSIDE else own


def _paired(value: Stored, heads: int, where: str) -> Stored:
    """Rows of queries or keys with the first half of each head's channels before the second, as rotations have them;
    in the file those that rotate together stand beside each other."""
    rows = value.shape[0]
    if not heads or rows % (2 * heads):
        raise CheckpointError(f"{where}: {rows} rows of queries or keys do not split into {heads} heads")
    plain = dataclasses.replace(value)

    def decoded(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
        if plain.decoded is not None:
            found = plain.decoded(content, shape)
        else:
            found = np.frombuffer(content, plain.dtype).reshape(shape)
        if shape[0] != rows:
            return found  # of some rows nobody asks for the order
        return found.reshape(heads, rows // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)

    row = value.row_bytes or value.dtype.itemsize * (value.size // rows)
    return dataclasses.replace(value, decoded=decoded, row_bytes=row)
