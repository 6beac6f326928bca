"""What families of Llama's kind share: a stack of attention and gated feed-forwards, and the fields that say which."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from adaptive.errors import RecipeError
from adaptive.interop.families import Family
from adaptive.interop.fields import Fields
from adaptive.interop.llama import NORMS, block_parts, ends_layout, with_head
from adaptive.interop.rotary import rope_fields, rotary
from adaptive.interop.tensors import Layout, stack_layout
from adaptive.layers import stack
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards import dense
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model
from adaptive.models.bodies import plain

MOST_LAYERS = 1000  # each is listed before any tensor is looked at
USUAL: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False, "pad_token_id": None, "rope_theta": 1e4}
SLIDING, FULL = "sliding_attention", "full_attention"


class LlamaLike(Family):
    """norms       name of each norm of a block
    norms_at    where they stand
    norm_offset what our norms' weights have more than theirs
    qk_norm     of attention
    act         field of the activation, and its spellings for ours
    """

    norms: Mapping[str, str] = NORMS
    norms_at: Literal["input", "output", "both"] = "input"
    norm_offset: float = 0.0
    qk_norm: Literal["none", "head", "full"] = "none"
    act: tuple[str, tuple[str, ...], dense.Activation] = ("hidden_act", ("silu", "swish"), "silu")

    def settings(self, fields: Fields) -> language_model.Settings:
        self.check(fields)
        width, layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers", most=MOST_LAYERS)
        feed_forward = dense.Settings(fields.integer("intermediate_size"), self.act[2])
        usual = self.attention(fields, width)
        attentions = [self.of_layer(usual, fields, i, layers) for i in range(layers)]
        blocks = [Block(attention, feed_forward, norms_at=self.norms_at) for attention in attentions]
        ours = language_model.Settings(
            vocab_size=fields.integer("vocab_size"),
            width=width,
            body=plain.Settings(patterned(blocks)),
            norm_eps=fields.number("rms_norm_eps"),
            padding_token=padding_token(fields),
            tie_embeddings=fields.boolean("tie_word_embeddings"),
            **self.language(fields, width),
        )
        fields.check_rest()
        return ours

    def check(self, fields: Fields) -> None:
        """Refuses values of fields that this family reads and that are not built here."""
        fields.only(self.act[0], *self.act[1])
        fields.only("mlp_bias", False, None)

    def attention(self, fields: Fields, width: int) -> Attention:
        """What the layers' attention has in common."""
        heads = fields.integer("num_attention_heads")
        theta, scaling = rotary(fields)
        return Attention(
            heads=heads,
            kv_heads=fields.integer_or_none("num_key_value_heads") or heads,
            head_dim=fields.integer_or_none("head_dim") or width // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            bias=self.bias(fields),
            qk_norm=self.qk_norm,
        )

    def bias(self, fields: Fields) -> Literal["none", "qkv", "all"]:
        return "all" if fields.boolean("attention_bias") else "none"

    def of_layer(self, usual: Attention, fields: Fields, i: int, layers: int) -> Attention:
        """The attention of layer `i` of so many."""
        return usual

    def language(self, fields: Fields, width: int) -> dict[str, Any]:
        """Settings around the layers that this family alone has."""
        return {}

    def config(self, settings: language_model.Settings) -> dict[str, Any]:
        blocks = blocks_of(settings)
        attention, feed_forward = blocks[-1].mixer, blocks[-1].feed_forward
        if not isinstance(attention, Attention) or not isinstance(feed_forward, dense.Settings):
            raise RecipeError("has attention and a dense feed-forward in every layer")
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": settings.vocab_size,
            "hidden_size": settings.width,
            "intermediate_size": feed_forward.hidden,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.groups,
            "head_dim": attention.head_dim,
            self.act[0]: self.act[1][0],
            "rms_norm_eps": settings.norm_eps,
            "tie_word_embeddings": settings.tie_embeddings,
            "pad_token_id": settings.padding_token if settings.padding_token >= 0 else None,
            "attention_bias": attention.bias == "all",
            "attention_dropout": 0.0,
            "mlp_bias": False,
            **rope_fields(attention.rope_theta, attention.rope_scaling),
            **self.more(settings, blocks, attention),
        }

    def more(self, settings: language_model.Settings, blocks: list[Block], attention: Attention) -> dict[str, Any]:
        """Fields of this family alone; attention: that of the last layer."""
        return {}

    def layout(self, settings: language_model.Settings) -> Layout:
        body = settings.body
        assert isinstance(body, plain.Settings)
        names = [f"model.layers.{i}" for i in range(body.layers)]
        parts = functools.partial(block_parts, width=settings.width, norms=self.norms, offset=self.norm_offset)
        ends = ends_layout(settings, ("body", "stack", "norm", "weight"), self.norm_offset)
        return ends | stack_layout(("body", "stack"), body.stack, parts, names)

    def tidied(
        self, settings: language_model.Settings, tensors: Mapping[str, Any]
    ) -> tuple[language_model.Settings, dict[str, Any]]:
        kept = {name: value for name, value in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
        return with_head(settings, kept)


def patterned(blocks: list[Block]) -> stack.Settings:
    """These blocks, one for each layer, as the shortest pattern that repeats."""
    layers = len(blocks)
    fits = (p for p in range(1, layers + 1) if layers % p == 0 and blocks[:p] * (layers // p) == blocks)
    period = next(fits, layers)
    runs = [(block, len(list(run))) for block, run in itertools.groupby(blocks[:period])]
    if len(runs) == 1:
        return stack.Settings((runs[0][0],), repeats=layers)
    return stack.Settings(
        tuple(dataclasses.replace(block, repeat=count) for block, count in runs), repeats=layers // max(period, 1)
    )


def blocks_of(settings: language_model.Settings) -> list[Block]:
    """The block of each layer, once each. RecipeError where the model is no stack."""
    body = settings.body
    if not isinstance(body, plain.Settings):
        raise RecipeError(f"is one stack (body=plain), not {body.kind()}")
    pattern = [dataclasses.replace(block, repeat=1) for block in body.stack.blocks for _ in range(block.repeat)]
    return pattern * body.stack.repeats


def padding_token(fields: Fields) -> int:
    """The token whose embedding the lookup does not train, -1: none. Negative ids count from the end."""
    token = fields.get("pad_token_id")
    if token is None:
        return -1
    vocabulary = fields.integer("vocab_size")
    if isinstance(token, bool) or not isinstance(token, int) or not -vocabulary <= token < vocabulary:
        raise fields.wrong("pad_token_id", f"must be a token below vocab_size={vocabulary}, or null for none")
    return token % vocabulary


def layer_types(fields: Fields, layers: int, usual: Sequence[str]) -> Sequence[str]:
    """Which attention each layer has, sliding_attention or full_attention; `usual` where the field is left out."""
    given = fields.given("layer_types")
    if given is None:
        return usual
    if not isinstance(given, list) or len(given) != layers or any(name not in (SLIDING, FULL) for name in given):
        raise fields.wrong("layer_types", f"must be a list of {layers}, each {FULL} or {SLIDING}")
    return given


def window(fields: Fields) -> int:
    """Positions that a query sees in a layer with a window."""
    size = fields.integer_or_none("sliding_window")
    return size or 0


def types_of(blocks: Sequence[Block]) -> dict[str, Any]:
    """Fields of windows, of the layers that have one."""
    windows = [block.mixer.window for block in blocks if isinstance(block.mixer, Attention)]
    names = [SLIDING if own else FULL for own in windows]
    return {"sliding_window": max(windows) or None, "layer_types": names}
