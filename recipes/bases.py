"""What families of recipes share: base shapes, training settings, and the ways a base becomes recursive or routed.

Sources: "MoR paper" is Mixture-of-Recursions, arXiv 2507.10524 v3; "released" is its code and configurations.
"""

import dataclasses

from adaptive.account import paper_flops_per_token
from adaptive.recipe import Published, Recipe

WARMUP_BUDGET = 2e18  # the warm-up is 5% of the steps that this budget buys (MoR paper, appendix on set-up)
UNPRINTED_RATE = "The peak learning rate was printed for 360M alone (3e-3); this size assumes the same."


# Base shapes


def tiny(steps: int = 1200) -> Recipe:
    """A byte-level model of 5 layers that learns on a laptop's CPU in minutes; our own choice of every number."""
    return Recipe(name="").with_(
        "model.vocab_size=320",  # 256 bytes and specials, rounded up to a multiple of 64
        "model.hidden_size=128",
        "model.intermediate_size=352",
        "model.num_layers=5",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.head_dim=32",
        "data=embedded",
        "data.seq_len=256",
        "optimizer.learning_rate=2.5e-3",
        "schedule.kind=trapezoid",
        "schedule.warmup_steps=60",
        f"train.steps={steps}",
        "train.batch_size=8",
        "eval.every=200",
        "checkpoint.every=200",
        "log.every=20",
    )


def bench() -> Recipe:
    """11 layers of width 256 on random tokens, for measuring a step; our own choice of every number.

    First + 3 * 3 + last layer: the depth that three recursions of a block of three share with a plain stack.
    """
    return tiny().with_(
        "model.hidden_size=256",
        "model.intermediate_size=688",
        "model.num_layers=11",
        "model.num_kv_heads=4",
        "model.head_dim=64",
        "data=synthetic",
        "data.seq_len=512",
        "data.cross_document=true",
        "train.steps=50",
        "train.batch_size=4",
    )


def llama_135m() -> Recipe:
    """30 layers of width 576 (MoR paper, table of model architectures; SmolLM-135M)."""
    return _llama(layers=30, width=576, heads=9, kv_heads=3, feed_forward=1536)


def llama_360m() -> Recipe:
    """32 layers of width 960 (MoR paper, table of model architectures; SmolLM-360M)."""
    return _llama(layers=32, width=960, heads=15, kv_heads=5, feed_forward=2560)


def llama_730m() -> Recipe:
    """26 layers of width 1536 (MoR paper, table of model architectures)."""
    return _llama(layers=26, width=1536, heads=24, kv_heads=8, feed_forward=4096)


def llama_1_7b() -> Recipe:
    """24 layers of width 2048 (MoR paper, table of model architectures; SmolLM-1.7B)."""
    return _llama(layers=24, width=2048, heads=32, kv_heads=32, feed_forward=8192)


def _llama(*, layers: int, width: int, heads: int, kv_heads: int, feed_forward: int) -> Recipe:
    return Recipe(name="").with_(
        "model.vocab_size=49152",  # SmolLM v1 configurations, here and in the next six
        f"model.num_layers={layers}",
        f"model.hidden_size={width}",
        f"model.num_heads={heads}",
        f"model.num_kv_heads={kv_heads}",
        f"model.intermediate_size={feed_forward}",
        "model.head_dim=64",
        "model.norm_eps=1e-5",
        "model.rope_theta=1e4",
        "model.tie_embeddings=true",
        "model.init_std=0.02",
        "data=fineweb_edu",  # MoR paper, appendix on set-up: fineweb-edu-dedup of SmolLM-Corpus, SmolLM's tokenizer
        "data.seq_len=2048",  # MoR paper, appendix on set-up
        "data.shuffle=false",  # released configurations: documents in stored order
        "data.cross_document=true",  # released code: rows are cut from one stream, attention crosses documents
        "optimizer.learning_rate=3e-3",  # released 360M configurations
        "optimizer.beta1=0.9",  # released configurations, here and in the next four
        "optimizer.beta2=0.95",
        "optimizer.eps=1e-8",
        "optimizer.weight_decay=0.1",
        "optimizer.clip_norm=1.0",
        "schedule.kind=trapezoid",  # MoR paper, appendix on set-up, here and in the next two
        "schedule.decay_fraction=0.2",
        "schedule.floor=0",
        "train.batch_size=1024",  # released configurations: 1024 rows of 2048 tokens, 16 rows per device at once
        "train.device_batch_size=16",
        "eval.every=500",  # ours, here and in the next two
        "checkpoint.every=500",
        "log.every=10",
    )


# What becomes of a base


def recursive(base: Recipe, recursions: int) -> Recipe:
    """The base with its middle layers shared by `recursions` passes; the first and the last layer stay their own."""
    return base.with_(f"model.recursions={recursions}", "model.sharing=middle_cycle", "model.kv=per_recursion")


def mor(base: Recipe, recursions: int) -> Recipe:
    """The recursive base with the router that the paper chose (appendix on expert-choice routing): linear, sigmoid,
    alpha 0.1, auxiliary loss 0.001, no z-loss, no capacity warm-up, capacities (N_r - r + 1) / N_r.

    The released code adds the auxiliary loss undivided in each of 16 accumulated micro-batches, about 0.016 per step:
    `model.router.aux_coefficient=0.016` imitates it.
    """
    return recursive(base, recursions).with_(
        "model.router.kind=expert_choice",
        "model.router.network=linear",
        "model.router.activation=sigmoid",
        "model.router.alpha=0.1",
        "model.router.temperature=1",
        "model.router.gating=weighted",
        "model.router.capacities=",
        "model.router.sampling=aux_loss",
        "model.router.aux_coefficient=0.001",
        "model.router.z_coefficient=0",
        "model.router.capacity_warmup_steps=0",
    )


def mor_token(base: Recipe, recursions: int) -> Recipe:
    """The recursive base with token-choice routing as the paper chose (appendix on token-choice routing): linear,
    softmax, alpha 1, balancing loss 0.1; the small z-loss is the released configuration's. Exact, masked execution."""
    return recursive(base, recursions).with_(
        "model.router.kind=token_choice",
        "model.router.network=linear",
        "model.router.activation=softmax",
        "model.router.alpha=1",
        "model.router.temperature=1",
        "model.router.gating=weighted",
        "model.router.balancing=loss",
        "model.router.balance_coefficient=0.1",
        "model.router.z_coefficient=1e-5",
        "model.router.balance_warmup_steps=0",
        "model.router.execution=masked",
    )


def moe(base: Recipe, router: str, *options: str, experts: int = 8, per_token: float = 2, size: int = 0) -> Recipe:
    """The base with experts in place of every feed-forward.

    size     hidden width of an expert; 0: such that `per_token` experts cost what the base's feed-forward does
    options  the router's own settings, as name=value
    """
    return base.with_(
        f"model.moe.router={router}",
        f"model.moe.experts={experts}",
        f"model.moe.experts_per_token={per_token:g}",
        f"model.moe.expert_size={size or round(base.model.intermediate_size / per_token)}",
        f"model.moe.options={','.join(options)}",
    )


def budgeted(recipe: Recipe, flops: float) -> Recipe:
    """Steps and warm-up that the paper's FLOP accounting buys; derived, for runs whose configuration is not released.

    The same arithmetic gives every released step count within one step.
    """
    per_step = paper_flops_per_token(recipe.model, recipe.data.seq_len) * tokens_per_step(recipe)
    return recipe.with_(
        f"train.steps={round(flops / per_step)}", f"schedule.warmup_steps={round(0.05 * WARMUP_BUDGET / per_step)}"
    )


def ablation(recipe: Recipe, tokens: float) -> Recipe:
    """A run of `tokens` tokens under the ablations' cosine schedule (MoR paper, appendix on set-up).

    Warm-up 5% of the steps and floor 0.1 follow the released example configuration; the paper prints no floor.
    """
    steps = round(tokens / tokens_per_step(recipe))
    return recipe.with_(
        f"train.steps={steps}",
        "schedule.kind=cosine",
        f"schedule.warmup_steps={round(0.05 * steps)}",
        "schedule.floor=0.1",
    )


def tokens_per_step(recipe: Recipe) -> int:
    return recipe.train.batch_size * recipe.data.seq_len


def titled(recipe: Recipe, name: str, description: str, published: Published | None = None) -> Recipe:
    """The recipe under a name, which is that of its file, one line on what it is, and what it should reproduce."""
    return dataclasses.replace(recipe, name=name, description=description, published=published or Published())
