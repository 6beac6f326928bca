"""Masked diffusion with token choice on bytes: top-4 of 16 experts per layer beside two shared ones, dropless.

python -m adaptive.train --recipe dlm_tc_tiny
Numbers:  our own, for a CPU in minutes; the router as EC-DLM compares with
Expect:   not measured
Cost:     not measured
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import PER_TOKEN, chosen_by_tokens, tiny_experts


def recipe() -> Recipe:
    return titled(
        tiny_experts(chosen_by_tokens(PER_TOKEN)),
        "dlm_tc_tiny",
        "masked diffusion with token-choice experts on the embedded English text, for a CPU",
    )
