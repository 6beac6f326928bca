"""Names of tensors that models of Llama's kind share, whoever released them."""

from collections.abc import Iterator

from adaptive.interop.tensors import Layout, Part, Path, one
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards.dense import Settings as Dense
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def ends_layout(settings: language_model.Settings, norm: Path) -> Layout:
    """Embedding, output head and the last norm, whose path is `norm`."""
    vocab = (settings.vocab_size, settings.width)
    head: Layout = {} if settings.tie_embeddings else {("head",): one(HEAD, vocab)}
    return {("embedding",): one(EMBEDDING, vocab), norm: one("model.norm.weight", (settings.width,))} | head


def block_parts(block: Block, width: int) -> Iterator[tuple[Path, Part]]:
    """(path in a block, official tensor inside its layer) of norms, attention and a dense feed-forward."""
    attention, dense = block.mixer, block.feed_forward
    assert isinstance(attention, Attention)
    queries, keys = attention.heads * attention.head_dim, attention.groups * attention.head_dim
    yield ("mixer_norm", "weight"), Part("input_layernorm.weight", (width,), False)
    yield ("feed_forward_norm", "weight"), Part("post_attention_layernorm.weight", (width,), False)
    for name, shape in (("q", (queries, width)), ("k", (keys, width)), ("v", (keys, width)), ("o", (width, queries))):
        yield ("mixer", name), Part(f"self_attn.{name}_proj.weight", shape, True)
        if attention.bias:
            yield ("mixer", f"{name}_bias"), Part(f"self_attn.{name}_proj.bias", shape[:1], False)
    if attention.qk_norm != "none":
        for name, whole in (("q_norm", queries), ("k_norm", keys)):
            size = whole if attention.qk_norm == "full" else attention.head_dim
            yield ("mixer", name, "weight"), Part(f"self_attn.{name}.weight", (size,), False)
    if isinstance(dense, Dense):
        inner = dense.hidden
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            yield ("feed_forward", name), Part(f"mlp.{name}_proj.weight", shape, True)
