"""Expert choice over denoising time on bytes: 6 experts per token where little is hidden, down to 2 where all is.

python -m adaptive.train --recipe dlm_ec_dynamic_tiny
Numbers:  our own, for a CPU in minutes; EC-DLM's best schedule, linear_reverse, around the 4 of dlm_ec_tiny
Expect:   not measured
Cost:     not measured
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import PER_TOKEN, chosen_by_experts, tiny_experts


def recipe() -> Recipe:
    return titled(
        tiny_experts(chosen_by_experts(PER_TOKEN, "linear_reverse", 2, 6)),
        "dlm_ec_dynamic_tiny",
        "masked diffusion whose experts take more where less is hidden, on the embedded English text, for a CPU",
    )
