"""Vanilla transformer of 11 layers, width 256, on rows of random tokens: the measure of mor_bench.

python -m adaptive.train --recipe vanilla_bench
Numbers:  our own; sizes at which a step takes a fraction of a second on a CPU
Expect:   no learning: the tokens are random. For python -m adaptive.bench train --recipe vanilla_bench
Cost:     docs/benchmarks.md
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import bench, titled


def recipe() -> Recipe:
    return titled(bench(), "vanilla_bench", "vanilla transformer on random tokens, to measure a step")
