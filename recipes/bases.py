"""What families of recipes share: base shapes, training settings, and the ways a base becomes recursive or routed.

Sources: "MoR paper" is Mixture-of-Recursions, arXiv 2507.10524 v3; "released" is its code and configurations.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adaptive.account import paper_flops_per_token
from adaptive.data.config import DATA_PRESETS
from adaptive.layers import block, stack
from adaptive.layers.feed_forwards import dense
from adaptive.layers.feed_forwards import experts as mixture
from adaptive.layers.mixers import attention
from adaptive.layers.moe.settings import RouterSettings
from adaptive.models import language_model
from adaptive.models.bodies import Body, plain
from adaptive.models.bodies import recursive as recursion
from adaptive.models.depth import Depth, expert_choice, token_choice
from adaptive.recipe import Published, Recipe

WARMUP_BUDGET = 2e18  # the warm-up is 5% of the steps that this budget buys (MoR paper, appendix on set-up)
UNPRINTED_RATE = "The peak learning rate was printed for 360M alone (3e-3); this size assumes the same."


def changed(recipe: Recipe, **groups: Mapping[str, Any]) -> Recipe:
    """The recipe with fields of its groups replaced: changed(recipe, train={"steps": 10}, schedule={"floor": 0.1})."""
    return replace(recipe, **{name: replace(getattr(recipe, name), **fields) for name, fields in groups.items()})


def steps(recipe: Recipe, count: int, warmup: int) -> Recipe:
    """The recipe with so many steps, of which the first warm up."""
    return changed(recipe, train={"steps": count}, schedule={"warmup_steps": warmup})


# Base shapes


def layers_of(
    *, layers: int, heads: int, kv_heads: int, head_dim: int, hidden: int, rope_theta: float = 1e4
) -> stack.Settings:
    """Equal transformer blocks."""
    mixer = attention.Settings(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
    return stack.Settings((block.Settings(mixer, dense.Settings(hidden)),), repeats=layers)


def transformer(*, vocab_size: int, width: int, **shape: Any) -> language_model.Settings:
    """A plain transformer; shape: as of `layers_of`."""
    return language_model.Settings(vocab_size=vocab_size, width=width, body=plain.Settings(layers_of(**shape)))


def tiny(count: int = 1200) -> Recipe:
    """A byte-level model of 5 layers that learns on a laptop's CPU in minutes; our own choice of every number.

    count: of steps
    """
    model = transformer(
        layers=5,
        width=128,
        heads=4,
        kv_heads=2,
        head_dim=32,
        hidden=352,
        vocab_size=320,  # 256 bytes and specials, rounded up to a multiple of 64
    )
    return changed(
        Recipe(name="", model=model),
        data={**DATA_PRESETS["embedded"], "seq_len": 256},
        optimizer={"learning_rate": 2.5e-3},
        schedule={"kind": "trapezoid", "warmup_steps": 60},
        train={"steps": count, "batch_size": 8},
        eval={"every": 200},
        checkpoint={"every": 200},
        log={"every": 20},
    )


def bench() -> Recipe:
    """11 layers of width 256 on random tokens, for measuring a step; our own choice of every number.

    First + 3 * 3 + last layer: the depth that three recursions of a block of three share with a plain stack.
    """
    model = transformer(layers=11, width=256, heads=4, kv_heads=4, head_dim=64, hidden=688, vocab_size=320)
    return changed(
        replace(tiny(), model=model),
        data={**DATA_PRESETS["synthetic"], "seq_len": 512, "cross_document": True},
        train={"steps": 50, "batch_size": 4},
    )


def llama_135m(layers: int = 30, rope_theta: float = 1e4) -> Recipe:
    """30 layers of width 576 (MoR paper, table of model architectures; SmolLM-135M; SmolLM2's has a base of 1e5)."""
    return _llama(layers=layers, width=576, heads=9, kv_heads=3, hidden=1536, rope_theta=rope_theta)


def llama_360m(layers: int = 32) -> Recipe:
    """32 layers of width 960 (MoR paper, table of model architectures; SmolLM-360M)."""
    return _llama(layers=layers, width=960, heads=15, kv_heads=5, hidden=2560)


def llama_730m(layers: int = 26) -> Recipe:
    """26 layers of width 1536 (MoR paper, table of model architectures)."""
    return _llama(layers=layers, width=1536, heads=24, kv_heads=8, hidden=4096)


def llama_1_7b(layers: int = 24) -> Recipe:
    """24 layers of width 2048 (MoR paper, table of model architectures; SmolLM-1.7B)."""
    return _llama(layers=layers, width=2048, heads=32, kv_heads=32, hidden=8192)


def _llama(*, width: int, **shape: Any) -> Recipe:
    # SmolLM v1 configurations; norm_eps 1e-5, theta 1e4, tied embeddings and a standard deviation of 0.02 as well.
    model = transformer(width=width, head_dim=64, vocab_size=49152, **shape)
    model = replace(model, norm_eps=1e-5, tie_embeddings=True, init_std=0.02, embedding_std=0.02)
    return changed(
        Recipe(name="", model=model),
        data={
            **DATA_PRESETS["fineweb_edu"],  # MoR paper, appendix on set-up: fineweb-edu-dedup of SmolLM-Corpus
            "seq_len": 2048,  # MoR paper, appendix on set-up
            "shuffle": False,  # released configurations: documents in stored order
            "cross_document": True,  # released code: rows are cut from one stream, attention crosses documents
        },
        optimizer={
            "learning_rate": 3e-3,  # released 360M configurations
            "beta1": 0.9,  # released configurations, here and in the next four
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
        schedule={
            "kind": "trapezoid",  # MoR paper, appendix on set-up, here and in the next two
            "decay_fraction": 0.2,
            "floor": 0.0,
            "count_from": "zero",  # released code: the first step has rate 0
        },
        train={
            "batch_size": 1024,
            "device_batch_size": 16,  # released configurations: 16 rows per device at once
            "remat": "layer",  # ours: 16 rows of the 360M shape keep about 50 GB without; the numbers are the same
        },
        eval={"every": 500, "rows": 8192},  # ours, here and in the next two
        checkpoint={"every": 500},
        log={"every": 10},
    )


# What becomes of a base


def with_body(recipe: Recipe, body: Body) -> Recipe:
    return changed(recipe, model={"body": body})


def stack_of(recipe: Recipe) -> stack.Settings:
    """The stack of a plain base."""
    body = recipe.model.body
    assert isinstance(body, plain.Settings)
    return body.stack


def shared(whole: stack.Settings, recursions: int, **options: Any) -> recursion.Settings:
    """The stack with its middle layers shared by so many passes; the first and the last layer stay their own."""
    passes, rest = divmod(whole.repeats - 2, recursions)
    assert not rest, f"{whole.repeats} layers do not hold a first, a last and {recursions} recursions"
    end = replace(whole, repeats=1)
    core = replace(whole, repeats=passes)
    return recursion.Settings(prelude=end, core=core, coda=end, recursions=recursions, **options)


def recursive(base: Recipe, recursions: int, **options: Any) -> Recipe:
    """The base with its middle layers shared by `recursions` passes; the first and the last layer stay their own."""
    return with_body(base, shared(stack_of(base), recursions, **options))


def mor_depth() -> Depth:
    """The router that the MoR paper chose (appendix on expert-choice routing): linear, sigmoid, alpha 0.1, auxiliary
    loss 0.001, no z-loss, no capacity warm-up, capacities (N_r - r + 1) / N_r.

    The released code adds the auxiliary loss undivided in each of 16 accumulated micro-batches, about 0.016 per step:
    `model.body.depth.aux_coefficient=0.016` imitates it.
    """
    return expert_choice.Settings(
        network="linear",
        activation="sigmoid",
        alpha=0.1,
        temperature=1.0,
        gating="weighted",
        capacities=(),
        sampling="aux_loss",
        aux_coefficient=0.001,
        z_coefficient=0.0,
        capacity_warmup_steps=0,
    )


def mor(base: Recipe, recursions: int, **options: Any) -> Recipe:
    """The recursive base with the router that the paper chose (`mor_depth`)."""
    return recursive(base, recursions, depth=mor_depth(), **options)


def mor_token(base: Recipe, recursions: int) -> Recipe:
    """The recursive base with token-choice routing as the paper chose (appendix on token-choice routing): linear,
    softmax, alpha 1, balancing loss 0.1; the small z-loss is the released configuration's. Exact, masked execution."""
    depth = token_choice.Settings(
        network="linear",
        activation="softmax",
        alpha=1.0,
        temperature=1.0,
        gating="weighted",
        balancing="loss",
        balance_coefficient=0.1,
        z_coefficient=1e-5,
        balance_warmup_steps=0,
        execution="masked",
    )
    return recursive(base, recursions, depth=depth)


def moe(base: Recipe, router: RouterSettings, *, experts: int = 8, size: int = 176, gated: bool = True) -> Recipe:
    """The plain base with experts, each of hidden width `size`, in place of every feed-forward.

    Two of 176 cost what the tiny base's feed-forward does.
    """
    routed = mixture.Settings(router=router, experts=experts, expert_size=size, gated=gated)
    whole = stack_of(base)
    blocks = tuple(replace(one, feed_forward=routed) for one in whole.blocks)
    return with_body(base, plain.Settings(replace(whole, blocks=blocks)))


def budgeted(recipe: Recipe, flops: float) -> Recipe:
    """Steps and warm-up that the paper's FLOP accounting buys; derived, for runs whose configuration is not released.

    The same arithmetic gives every released step count within one step.
    """
    per_step = paper_flops_per_token(recipe.model, recipe.data.seq_len) * tokens_per_step(recipe)
    return steps(recipe, round(flops / per_step), round(0.05 * WARMUP_BUDGET / per_step))


def ablation(recipe: Recipe, tokens: float) -> Recipe:
    """A run of `tokens` tokens under the ablations' cosine schedule (MoR paper, appendix on set-up).

    Warm-up 5% of the steps and floor 0.1 follow the released example configuration; the paper prints no floor.
    """
    count = round(tokens / tokens_per_step(recipe))
    return changed(steps(recipe, count, round(0.05 * count)), schedule={"kind": "cosine", "floor": 0.1})


def tokens_per_step(recipe: Recipe) -> int:
    return recipe.train.batch_size * recipe.data.seq_len


def titled(recipe: Recipe, name: str, description: str, published: Published | None = None) -> Recipe:
    """The recipe under a name, which is that of its file, one line on what it is, and what it should reproduce."""
    return replace(recipe, name=name, description=description, published=published or Published())
