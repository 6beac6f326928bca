"""What recipes of diffusion language models share: a tiny family, and the published networks with experts.

Sources: "EC-DLM" is arXiv 2604.01622; "released" is its code and README. UNCONFIRMED marks what neither tells.
"""

from dataclasses import replace

from adaptive.layers import block, stack
from adaptive.layers.feed_forwards import experts as mixture
from adaptive.layers.mixers import attention
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.layers.moe.settings import RouterSettings
from adaptive.models import language_model
from adaptive.models.bodies import plain
from adaptive.objectives import Objective, masked_diffusion
from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, moe, stack_of, steps, tiny

EXPERTS, PER_TOKEN = (
    16,
    4,
)  # of the tiny family: 4 of 16, and two that all tokens share, cost what its feed-forward does
SIZE = 56
SOURCE = "EC-DLM, arXiv 2604.01622"


def tiny_diffusion(count: int = 1200, objective: Objective | None = None) -> Recipe:
    """The tiny base for so many steps, trained to say what is hidden.

    A model of bytes first learns how often each is, and for long nothing else. Slower rates, normalised queries and
    keys, and rotary angles that tell neighbours apart end that sooner (ours).
    """
    recipe = tiny(count)
    whole = stack_of(recipe)
    (one,) = whole.blocks
    assert isinstance(one.mixer, attention.Settings)
    mixer = replace(one.mixer, rope_theta=100.0, qk_norm="head")
    body = plain.Settings(replace(whole, blocks=(replace(one, mixer=mixer),)))
    recipe = replace(recipe, objective=objective or masked_diffusion.Settings())
    return changed(recipe, model={"body": body}, optimizer={"learning_rate": 2e-3})


def tiny_experts(router: RouterSettings) -> Recipe:
    """The tiny base with fine-grained experts (EC-DLM's shape: two experts are shared) in every layer."""
    recipe = moe(tiny_diffusion(), router, experts=EXPERTS, size=SIZE)
    whole = stack_of(recipe)
    (one,) = whole.blocks
    assert isinstance(one.feed_forward, mixture.Settings)
    shared = replace(one.feed_forward, shared_size=2 * SIZE)
    return changed(recipe, model={"body": plain.Settings(replace(whole, blocks=(replace(one, feed_forward=shared),)))})


def chosen_by_experts(per_token: float, schedule: str = "static", least: int = 0, most: int = 0) -> RouterSettings:
    """Expert choice as EC-DLM releases it: logits rank a sequence's tokens, a token's weights are a softmax over the
    experts that took it. schedule, least, most: experts per token by how much of the text is hidden."""
    return expert_choice.Settings(
        experts_per_token=per_token,
        score="selected",
        decode="refuse",
        schedule=schedule,  # type: ignore[arg-type]
        k_min=least,
        k_max=most,
    )


def chosen_by_tokens(per_token: int, capacity: float = 0.0) -> RouterSettings:
    """Token choice as EC-DLM compares with: weights are a softmax over the chosen logits; capacity 0 drops none."""
    return token_choice.Settings(experts_per_token=per_token, score="logits", capacity_factor=capacity)


def published(width: int, experts: int, size: int, router: RouterSettings, *, seq_len: int, rows: int) -> Recipe:
    """A network of EC-DLM: 16 layers of 16 heads, experts in each, two of them shared (table of configurations)."""
    mixer = attention.Settings(heads=16, kv_heads=16, head_dim=width // 16, rope_theta=1e4, qk_norm="head")
    routed = mixture.Settings(router=router, experts=experts, expert_size=size, shared_size=2 * size)
    model = language_model.Settings(
        vocab_size=50_304,  # GPT-NeoX's 50,277 tokens, behind which the mask is 50277, and what rounds them up
        width=width,
        body=plain.Settings(stack.Settings((block.Settings(mixer, routed),), repeats=16)),
        tie_embeddings=False,
        norm_eps=1e-6,
        init_std=0.02,
        embedding_std=0.02,
    )
    recipe = changed(
        Recipe(name="", model=model, objective=masked_diffusion.Settings(mask_id=50_277, draws="stratified")),
        data={"source": "huggingface", "tokenizer": "EleutherAI/gpt-neox-20b", "seq_len": seq_len},
        optimizer={"learning_rate": 2e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0},
        schedule={"kind": "trapezoid", "floor": 0.1, "decay_shape": "linear"},  # released: an exponential decay
        train={"batch_size": rows, "remat": "layer"},
        eval={"every": 1000, "rows": 2048},  # ours, here and in the next two
        checkpoint={"every": 1000},
        log={"every": 10},
    )
    return recipe


def owt(router: RouterSettings) -> Recipe:
    """The OpenWebText study: 512 experts, 30B tokens in rows of 512 (EC-DLM)."""
    recipe = published(512, 512, 384, router, seq_len=512, rows=256)
    recipe = changed(recipe, data={"paths": ("Skylion007/openwebtext",)})
    return _steps(recipe, 30e9)


def nemotron(router: RouterSettings) -> Recipe:
    """The Nemotron-CC-v2 study: 8B parameters, 1B of them active, without the weight 1 / r in training (EC-DLM)."""
    recipe = published(2048, 64, 1280, router, seq_len=2048, rows=288)
    assert isinstance(recipe.objective, masked_diffusion.Settings)
    recipe = replace(recipe, objective=replace(recipe.objective, stable=True))
    recipe = changed(
        recipe,
        data={
            "paths": (
                "nvidia/Nemotron-CC-v2:High-Quality",
                "nvidia/Nemotron-CC-v2:Diverse-QA",
            ),
            "weights": (0.5, 0.5),
        },
    )
    return _steps(recipe, 100e9)  # UNCONFIRMED: the number of tokens is not told


def _steps(recipe: Recipe, tokens: float) -> Recipe:
    count = round(tokens / (recipe.train.batch_size * recipe.data.seq_len))
    recipe = steps(recipe, count, 2000)
    return changed(recipe, schedule={"decay_fraction": 1000 / count})
