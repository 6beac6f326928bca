"""LlamaByte, size L: a byte-level transformer of 16 layers, width 1024, window 1024 (206M).

python -m adaptive.train --recipe llamabyte_l
Numbers:  H-Net paper, tables of the main results and section 3; hnet_bases.py names the source of each. UNCONFIRMED:
          heads, rotary dimension and hidden size (the released T blocks' ratios), embeddings apart. The paper prints
          0.42 GFLOP per byte; its own formulas with 1024 keys give 0.48
Expect:   held-out FineWeb-Edu 0.859 bits per byte, average accuracy 44.1 (H-Net paper, tables of the main results);
          not measured here
Cost:     not measured; reduced twin: recipes/bytes_tiny.py (CPU, minutes)
"""

from adaptive.models.bodies import plain
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import RATE_L, WINDOW, attends, on_bytes, published, repeated, trained


def recipe() -> Recipe:
    one = attends(1024, 2816, window=WINDOW, repeat=16)
    return titled(
        trained(on_bytes(1024, plain.Settings(repeated(one))), RATE_L),
        "llamabyte_l",
        "Transformer on bytes with a window of 1024, size L (206M)",
        published("0.859 bits per byte, average accuracy 44.1"),
    )
