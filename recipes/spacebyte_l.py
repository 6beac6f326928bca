"""SpaceByte, size L: T8 + T16 + T8, widths 768 and 1536, a chunk after every space (567M).

python -m adaptive.train --recipe spacebyte_l
Numbers:  H-Net paper, tables of the main results and section 3; hnet_bases.py names the source of each. UNCONFIRMED:
          heads, the outer window (768, the width, as SpaceByte has it), learning rates by stage. Its chunks' outputs
          join the bytes through H-Net's residual projection. Capacities are ours; the paper prints 0.41 GFLOP per
          byte, the formulas give 0.44
Expect:   held-out FineWeb-Edu 0.791 bits per byte, average accuracy 49.4, 6.0 bytes per chunk (H-Net paper, tables of
          the main results); not measured here
Cost:     not measured; reduced twin: recipes/spacebyte_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Recipe
from recipes.bases import titled
from recipes.hnet_bases import RATE_L, published, ruled, stack, trained


def recipe() -> Recipe:
    network = stack('["T8", ["T16"], "T8"]', (768, 1536), (2048, 4096), windows=("767", "-1"), heads="12,16")
    return titled(
        ruled(trained(network, RATE_L), "space", 0.29),
        "spacebyte_l",
        "SpaceByte, size L (567M): transformers, a chunk after every space",
        published("0.791 bits per byte, average accuracy 49.4, 6.0 bytes per chunk"),
    )
