"""What families of recipes share: base shapes, training settings, and the ways a base becomes recursive or routed."""

import dataclasses

from adaptive.recipe import Recipe


def tiny() -> Recipe:
    """A byte-level model of 8 layers that learns on a laptop's CPU in minutes; our own choice of every number."""
    return Recipe(name="").with_(
        "model.vocab_size=320",  # 256 bytes and specials, rounded up to a multiple of 64
        "model.hidden_size=128",
        "model.intermediate_size=352",
        "model.num_layers=8",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.head_dim=32",
        "data=embedded",
        "data.seq_len=256",
        "optimizer.learning_rate=3e-3",
        "schedule.kind=trapezoid",
        "schedule.warmup_steps=50",
        "train.steps=1000",
        "train.batch_size=16",
        "eval.every=100",
        "checkpoint.every=200",
    )


def recursive(base: Recipe, recursions: int) -> Recipe:
    """The base with its middle layers shared by `recursions` passes; the first and the last layer stay their own."""
    return base.with_(f"model.recursions={recursions}", "model.sharing=middle_cycle", "model.kv=per_recursion")


def mor(base: Recipe, recursions: int) -> Recipe:
    """The recursive base with the router the paper chose (MoR paper, appendix on expert-choice routing): linear,
    sigmoid, alpha 0.1, auxiliary loss 0.001, no z-loss, no capacity warm-up, capacities (N_r - r + 1) / N_r."""
    return recursive(base, recursions).with_(
        "model.router.kind=expert_choice",
        "model.router.network=linear",
        "model.router.activation=sigmoid",
        "model.router.alpha=0.1",
        "model.router.sampling=aux_loss",
        "model.router.aux_coefficient=0.001",
    )


def titled(recipe: Recipe, name: str, description: str) -> Recipe:
    """The recipe under a name, which is that of its file, and one line on what it is."""
    return dataclasses.replace(recipe, name=name, description=description)
