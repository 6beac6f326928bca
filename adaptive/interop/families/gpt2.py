"""GPT-2: learned places, LayerNorm, biases everywhere, GELU. Linear weights are [in, out], and those of queries, keys
and values stand beside each other in one."""

from collections.abc import Iterator, Mapping
from typing import Any

from adaptive.errors import RecipeError
from adaptive.interop.families import Family
from adaptive.interop.fields import Fields
from adaptive.interop.llama import with_head
from adaptive.interop.llama_family import MOST_LAYERS, blocks_of, patterned
from adaptive.interop.tensors import Layout, Part, Path, one, stack_layout
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards import mlp
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model
from adaptive.models.bodies import plain

_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"

_DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True,
}  # fmt: skip


class GPT2(Family):
    architecture, model_type = "GPT2LMHeadModel", "gpt2"
    defaults = _DEFAULTS

    def settings(self, fields: Fields) -> language_model.Settings:
        fields.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
        fields.only("scale_attn_weights", True)
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            fields.only(name, False, None)
        fields.get("reorder_and_upcast_attn")  # of rounding alone
        width, heads = fields.integer("n_embd"), fields.integer("n_head")
        if width % heads:
            raise fields.wrong("n_head", f"must divide n_embd={width}")
        attention = Attention(heads=heads, head_dim=width // heads, rotary_dim=0, bias="all")
        feed_forward = mlp.Settings(fields.integer_or_none("n_inner") or 4 * width)
        block = Block(attention, feed_forward, norm="layer")
        ours = language_model.Settings(
            vocab_size=fields.integer("vocab_size"),
            width=width,
            body=plain.Settings(patterned([block] * fields.integer("n_layer", most=MOST_LAYERS))),
            norm_eps=fields.number("layer_norm_epsilon"),
            tie_embeddings=fields.boolean("tie_word_embeddings"),
            positions=fields.integer("n_positions"),
        )
        fields.check_rest()
        return ours

    def config(self, settings: language_model.Settings) -> dict[str, Any]:
        blocks = blocks_of(settings)
        attention, feed_forward = blocks[0].mixer, blocks[0].feed_forward
        if not isinstance(attention, Attention) or not isinstance(feed_forward, mlp.Settings):
            raise RecipeError("has attention and feed_forward=mlp in every layer")
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": settings.vocab_size,
            "n_positions": settings.positions,
            "n_embd": settings.width,
            "n_layer": len(blocks),
            "n_head": attention.heads,
            "n_inner": feed_forward.hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": settings.norm_eps,
            "tie_word_embeddings": settings.tie_embeddings,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }

    def layout(self, settings: language_model.Settings) -> Layout:
        body, width = settings.body, settings.width
        assert isinstance(body, plain.Settings)
        names = [f"transformer.h.{i}" for i in range(body.layers)]
        vocab = (settings.vocab_size, width)
        ends: Layout = {
            ("embedding",): one(_EMBEDDING, vocab),
            ("positions",): one("transformer.wpe.weight", (settings.positions, width)),
        }
        for name in ("weight", "bias"):
            ends["body", "stack", "norm", name] = one(f"transformer.ln_f.{name}", (width,))
        if not settings.tie_embeddings:
            ends["head",] = one(_HEAD, vocab)
        return ends | stack_layout(("body", "stack"), body.stack, lambda block: _parts(block, width), names)

    def tidied(
        self, settings: language_model.Settings, tensors: Mapping[str, Any]
    ) -> tuple[language_model.Settings, dict[str, Any]]:
        masks = (".attn.bias", ".attn.masked_bias")
        kept = {name: value for name, value in tensors.items() if not name.endswith(masks)}
        bare = ("wte.", "wpe.", "h.", "ln_f.")  # the first released files have no prefix
        kept = {f"transformer.{name}" if name.startswith(bare) else name: value for name, value in kept.items()}
        return with_head(settings, kept, _HEAD, _EMBEDDING)


def _parts(block: Block, width: int) -> Iterator[tuple[Path, Part]]:
    """(path in a block, tensor inside its layer) of each parameter of one block."""
    for ours, theirs in (("mixer_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
        for name in ("weight", "bias"):
            yield (ours, name), Part(f"{theirs}.{name}", (width,), False)
    assert isinstance(block.feed_forward, mlp.Settings)
    for i, name in enumerate("qkv"):
        rows = (i * width, (i + 1) * width)
        yield ("mixer", name), Part("attn.c_attn.weight", (width, 3 * width), False, rows, axis=1)
        yield ("mixer", f"{name}_bias"), Part("attn.c_attn.bias", (3 * width,), False, rows)
    yield ("mixer", "o"), Part("attn.c_proj.weight", (width, width), False)
    yield ("mixer", "o_bias"), Part("attn.c_proj.bias", (width,), False)
    inner = block.feed_forward.hidden
    for name, theirs, shape in (("up", "c_fc", (width, inner)), ("down", "c_proj", (inner, width))):
        yield ("feed_forward", name), Part(f"mlp.{theirs}.weight", shape, False)
        yield ("feed_forward", f"{name}_bias"), Part(f"mlp.{theirs}.bias", shape[1:], False)


FAMILY = GPT2()
