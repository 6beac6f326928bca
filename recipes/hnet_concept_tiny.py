"""ConceptMoE's chunking on bytes: random projections, random flips, a chunk is the sum over its positions.

python -m adaptive.train --recipe hnet_concept_tiny
Numbers:  our own, for a CPU in minutes; network as in hnet_tiny, chunking as in arXiv 2601.21420, which joins
          tokens, about two to a concept
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.recipe import Recipe
from recipes.bases import titled
from recipes.hnet_bases import chunks, tiny


def recipe() -> Recipe:
    return titled(
        tiny('["m2", ["T4"], "m2"]', (128, 192), (0, 512), *chunks("similarity", (3,), (0.5,)), "model.hnet.merge=sum"),
        "hnet_concept_tiny",
        "ConceptMoE's chunking on the embedded English text, for a CPU",
    )
