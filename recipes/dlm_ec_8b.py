"""EC-DLM on Nemotron-CC-v2: 64 experts per layer, each of which takes an eighth of a row (8B parameters, 1B active).

python -m adaptive.train --recipe dlm_ec_8b
Numbers:  EC-DLM, table of configurations and released code; dlm_bases.py names the source of each. UNCONFIRMED: the
          number of training tokens
Expect:   worse than dlm_ec_dynamic_8b in perplexity, MMLU and ARC-C (EC-DLM; values UNCONFIRMED); not measured here
Cost:     not measured; published on 32 H200; reduced twin: recipes/dlm_ec_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import SOURCE, chosen_by_experts, nemotron


def recipe() -> Recipe:
    return titled(
        nemotron(chosen_by_experts(8)),
        "dlm_ec_8b",
        "EC-DLM, 16 layers of 64 experts (8B, 1B active), masked diffusion on Nemotron-CC-v2",
        Published(source=SOURCE, notes="The number of training tokens is ours."),
    )
