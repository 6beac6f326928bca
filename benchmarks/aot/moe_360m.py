"""vanilla_360m with eight experts of half its hidden size in place of every feed-forward, two per token.

python -m adaptive.bench aot --recipe benchmarks/aot/moe_360m.py
As many active FLOPs as vanilla_360m and four times its feed-forward parameters, for compiling alone.
"""

from adaptive.layers.moe.routers import token_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import llama_360m, moe, steps, titled


def recipe() -> Recipe:
    routed = moe(llama_360m(), token_choice.Settings(experts_per_token=2), experts=8, size=1280)
    return titled(steps(routed, 9438, warmup=57), "moe_360m", "360M shape with 8 experts, 2 per token, dropless")
