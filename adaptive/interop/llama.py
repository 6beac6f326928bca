"""Names of tensors that models of Llama's kind share, whoever released them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from adaptive.interop.tensors import Layout, Part, Path, one, same, traced
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards.dense import Settings as Dense
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NORMS = {"mixer_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}  # of Llama


def ends_layout(settings: language_model.Settings, norm: Path, offset: float = 0.0) -> Layout:
    """Embedding, output head and the last norm, whose path is `norm` and whose weight is ours less `offset`."""
    vocab = (settings.vocab_size, settings.width)
    head: Layout = {} if settings.tie_embeddings else {("head",): one(HEAD, vocab)}
    last = Part("model.norm.weight", (settings.width,), False, offset=offset)
    return {("embedding",): one(EMBEDDING, vocab), norm: (last,)} | head


def block_parts(
    block: Block, width: int, norms: Mapping[str, str] = NORMS, offset: float = 0.0
) -> Iterator[tuple[Path, Part]]:
    """(path in a block, official tensor inside its layer) of norms, attention and a dense feed-forward.

    norms   name of each norm of the block that there is; offset: what ours has more than its weight
    """
    attention, dense = block.mixer, block.feed_forward
    assert isinstance(attention, Attention)
    queries, keys = attention.heads * attention.head_dim, attention.groups * attention.head_dim
    for ours, theirs in norms.items():
        yield (ours, "weight"), Part(f"{theirs}.weight", (width,), False, offset=offset)
    for name, shape in (("q", (queries, width)), ("k", (keys, width)), ("v", (keys, width)), ("o", (width, queries))):
        yield ("mixer", name), Part(f"self_attn.{name}_proj.weight", shape, True)
        if attention.bias == "all" or (attention.bias == "qkv" and name != "o"):
            yield ("mixer", f"{name}_bias"), Part(f"self_attn.{name}_proj.bias", shape[:1], False)
    if attention.qk_norm != "none":
        for name, whole in (("q_norm", queries), ("k_norm", keys)):
            size = whole if attention.qk_norm == "full" else attention.head_dim
            yield ("mixer", name, "weight"), Part(f"self_attn.{name}.weight", (size,), False, offset=offset)
    if isinstance(dense, Dense):
        inner = dense.hidden
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            yield ("feed_forward", name), Part(f"mlp.{name}_proj.weight", shape, True)


def with_head(
    settings: language_model.Settings, tensors: Mapping[str, Any], head: str = HEAD, embedding: str = EMBEDDING
) -> tuple[language_model.Settings, dict[str, Any]]:
    """The settings, untied where the head has values of its own, and the tensors without a head that is tied."""
    tensors = dict(tensors)
    if not settings.tie_embeddings or head not in tensors:
        return settings, tensors
    one, other = tensors[head], tensors.get(embedding)
    if other is not None and not same(one, other) and not traced(one, other):
        return dataclasses.replace(settings, tie_embeddings=False), tensors
    tensors.setdefault(embedding, tensors.pop(head))
    return settings, tensors
