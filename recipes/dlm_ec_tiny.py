"""Masked diffusion with expert choice on bytes: each of 16 experts per layer takes a quarter of every text.

python -m adaptive.train --recipe dlm_ec_tiny
Numbers:  our own, for a CPU in minutes; the router as EC-DLM releases it
Expect:   held-out bits per byte at most 4.23 at step 200, 3.35 at the end (2026-11-30, one CPU device, jax 0.10.2)
Cost:     19 TFLOPs; 5.3 min on two cores of an AMD EPYC
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import PER_TOKEN, chosen_by_experts, tiny_experts


def recipe() -> Recipe:
    return titled(
        tiny_experts(chosen_by_experts(PER_TOKEN)),
        "dlm_ec_tiny",
        "masked diffusion with expert-choice experts on the embedded English text, for a CPU",
    )
