"""EC-DLM on OpenWebText with capacity that falls from 32 experts per token where nothing is hidden to 8 where all is.

python -m adaptive.train --recipe dlm_ec_dynamic_owt
Numbers:  as of dlm_ec_owt; schedule linear_reverse, the best of those compared
Expect:   validation perplexity 36.5 after 30B tokens (EC-DLM, schedules at equal mean capacity); not measured here
Cost:     not measured; published on 8 H200; reduced twin: recipes/dlm_ec_dynamic_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import SOURCE, chosen_by_experts, owt


def recipe() -> Recipe:
    return titled(
        owt(chosen_by_experts(20, "linear_reverse", 8, 32)),
        "dlm_ec_dynamic_owt",
        "EC-DLM, 16 layers of 512 experts (4.9B), capacity by the hidden share, on OpenWebText",
        Published(result="validation perplexity 36.5", source=SOURCE, tokens=30e9),
    )
