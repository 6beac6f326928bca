"""EC-DLM on OpenWebText: 512 experts per layer, each of which takes 20 of a row's 512 tokens (4.9B parameters).

python -m adaptive.train --recipe dlm_ec_owt
Numbers:  EC-DLM, table of configurations and released code; dlm_bases.py names the source of each
Expect:   validation perplexity 37.1 after 30B tokens (EC-DLM, schedules at equal mean capacity); not measured here
Cost:     not measured; published on 8 H200 with mesh.expert=8; reduced twin: recipes/dlm_ec_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import SOURCE, chosen_by_experts, owt


def recipe() -> Recipe:
    return titled(
        owt(chosen_by_experts(20)),
        "dlm_ec_owt",
        "EC-DLM, 16 layers of 512 experts (4.9B), masked diffusion on OpenWebText",
        Published(result="validation perplexity 37.1", source=SOURCE, tokens=30e9),
    )
