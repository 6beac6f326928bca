"""ConceptMoE's chunking on bytes: random projections, random flips, a chunk is the sum over its positions.

python -m adaptive.train --recipe hnet_concept_tiny
Numbers:  our own, for a CPU in minutes; network as in hnet_tiny, chunking as in arXiv 2601.21420, which joins
          tokens, about two to a concept
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.layers.chunkers import similarity
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import tiny, tiny_stage


def recipe() -> Recipe:
    return titled(
        tiny(tiny_stage(similarity.Settings(target=3.0), 0.5, merge="sum")),
        "hnet_concept_tiny",
        "ConceptMoE's chunking on the embedded English text, for a CPU",
    )
