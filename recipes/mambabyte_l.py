"""MambaByte, size L: 28 Mamba-2 layers of width 1024 on bytes, no feed-forwards (185M).

python -m adaptive.train --recipe mambabyte_l
Numbers:  H-Net paper, tables of the main results and section 3; hnet_bases.py names the source of each. UNCONFIRMED:
          that its M layers have no feed-forward, which the printed 190M implies
Expect:   held-out FineWeb-Edu 0.845 bits per byte, average accuracy 44.3 (H-Net paper, tables of the main results);
          not measured here
Cost:     not measured; reduced twin: recipes/mambabyte_tiny.py (CPU, minutes)
"""

from adaptive.models.bodies import plain
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import RATE_L, on_bytes, published, repeated, scans, trained


def recipe() -> Recipe:
    return titled(
        trained(on_bytes(1024, plain.Settings(repeated(scans(repeat=28)))), RATE_L),
        "mambabyte_l",
        "Mamba-2 on bytes, size L (185M)",
        published("0.845 bits per byte, average accuracy 44.3"),
    )
