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

from adaptive.layers.chunkers import space
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import attends, published, ruled


def recipe() -> Recipe:
    side = attends(768, 2048, heads=12, window=768, repeat=8)
    inside = attends(1536, 4096, repeat=16)
    return titled(
        ruled(side, 768, inside, 1536, space.Settings(), 0.29),
        "spacebyte_l",
        "SpaceByte, size L (567M): transformers, a chunk after every space",
        published("0.791 bits per byte, average accuracy 49.4, 6.0 bytes per chunk"),
    )
