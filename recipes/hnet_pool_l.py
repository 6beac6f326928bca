"""H-Net (pool), size L: m4 + T28 + m4, widths 1024 and 1536, a chunk every 6 bytes (847M).

python -m adaptive.train --recipe hnet_pool_l
Numbers:  H-Net paper, tables of the main results and section 3; hnet_bases.py names the source of each. UNCONFIRMED:
          whether the stride restarts with each document (it does here, hence capacities above one in six)
Expect:   held-out FineWeb-Edu 0.780 bits per byte, average accuracy 51.6, 6.0 bytes per chunk (H-Net paper, tables of
          the main results); not measured here
Cost:     not measured; reduced twin: recipes/hnet_pool_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Recipe
from recipes.bases import titled
from recipes.hnet_bases import RATE_L, published, ruled, stack, trained


def recipe() -> Recipe:
    return titled(
        ruled(trained(stack('["m4", ["T28"], "m4"]', (1024, 1536), (0, 4096)), RATE_L), "stride", 0.2),
        "hnet_pool_l",
        "H-Net (pool), size L (847M): a chunk every 6 bytes",
        published("0.780 bits per byte, average accuracy 51.6, 6.0 bytes per chunk"),
    )
