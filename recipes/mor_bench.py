"""MoR of 11 effective layers, width 256, on rows of random tokens: a block of 3 applied up to 3 times.

python -m adaptive.train --recipe mor_bench
Numbers:  vanilla_bench made recursive and routed as mor_360m is
Expect:   no learning: the tokens are random. For python -m adaptive.bench train --recipe mor_bench
Cost:     docs/benchmarks.md
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import bench, mor, titled


def recipe() -> Recipe:
    return titled(mor(bench(), 3), "mor_bench", "Mixture-of-Recursions on random tokens, to measure a step")
