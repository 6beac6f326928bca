"""EC-DLM on Nemotron-CC-v2 whose capacity falls from 14 experts per token where nothing is hidden to 2 where all is.

python -m adaptive.train --recipe dlm_ec_dynamic_8b
Numbers:  as of dlm_ec_8b
Expect:   better than dlm_ec_8b in perplexity, MMLU and ARC-C (EC-DLM; values UNCONFIRMED); not measured here
Cost:     not measured; published on 32 H200; reduced twin: recipes/dlm_ec_dynamic_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import SOURCE, chosen_by_experts, nemotron


def recipe() -> Recipe:
    return titled(
        nemotron(chosen_by_experts(8, "linear_reverse", 2, 14)),
        "dlm_ec_dynamic_8b",
        "EC-DLM, 16 layers of 64 experts (8B, 1B active), capacity by the hidden share, on Nemotron-CC-v2",
        Published(source=SOURCE, notes="The number of training tokens is ours."),
    )
