"""H-Net (pool), size L: m4 + T28 + m4, widths 1024 and 1536, a chunk every 6 bytes (847M).

python -m adaptive.train --recipe hnet_pool_l
Numbers:  H-Net paper, tables of the main results and section 3; hnet_bases.py names the source of each. UNCONFIRMED:
          whether the stride restarts with each document (it does here, hence capacities above one in six)
Expect:   held-out FineWeb-Edu 0.780 bits per byte, average accuracy 51.6, 6.0 bytes per chunk (H-Net paper, tables of
          the main results); not measured here
Cost:     not measured; reduced twin: recipes/hnet_pool_tiny.py (CPU, minutes)
"""

from adaptive.layers.chunkers import stride
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import attends, published, ruled, scans


def recipe() -> Recipe:
    return titled(
        ruled(scans(repeat=4), 1024, attends(1536, 4096, repeat=28), 1536, stride.Settings(length=6), 0.2),
        "hnet_pool_l",
        "H-Net (pool), size L (847M): a chunk every 6 bytes",
        published("0.780 bits per byte, average accuracy 51.6, 6.0 bytes per chunk"),
    )
