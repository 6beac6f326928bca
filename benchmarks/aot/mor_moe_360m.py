"""mor_360m with eight experts of half its hidden size in place of every feed-forward, two per token: mor_moe_tiny's
pair of routers at the 360M shape.

python -m adaptive.bench aot --recipe benchmarks/aot/mor_moe_360m.py
For compiling alone.
"""

from adaptive.layers.moe.routers import expert_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import llama_360m, moe, mor, steps, titled


def recipe() -> Recipe:
    routed = mor(moe(llama_360m(), expert_choice.Settings(experts_per_token=2), experts=8, size=1280), 3)
    return titled(steps(routed, 9438, warmup=57), "mor_moe_360m", "MoR at the 360M shape with 8 experts per layer")
