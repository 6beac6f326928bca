"""LlamaByte with global attention: a byte-level transformer of 16 layers, width 1024 (206M).

python -m adaptive.train --recipe llamabyte_global_l
Numbers:  H-Net paper, tables of the main results and section 3; hnet_bases.py names the source of each. UNCONFIRMED:
          heads, rotary dimension and hidden size, as in llamabyte_l
Expect:   held-out FineWeb-Edu 0.845 bits per byte, average accuracy 44.3, at 2.3 times the FLOPs of the other models
          of size L (H-Net paper, tables of the main results); not measured here
Cost:     not measured; reduced twin: recipes/bytes_tiny.py (CPU, minutes)
"""

from adaptive.models.bodies import plain
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import RATE_L, attends, on_bytes, published, repeated, trained


def recipe() -> Recipe:
    return titled(
        trained(on_bytes(1024, plain.Settings(repeated(attends(1024, 2816, repeat=16)))), RATE_L),
        "llamabyte_global_l",
        "Transformer on bytes with global attention, size L (206M)",
        published("0.845 bits per byte, average accuracy 44.3"),
    )
