"""H-Net (space), size L: m4 + T28 + m4, widths 1024 and 1536, a chunk after every space (847M).

python -m adaptive.train --recipe hnet_space_l
Numbers:  H-Net paper, tables of the main results and section 3; hnet_bases.py names the source of each. UNCONFIRMED:
          what smooths the chunks (nothing does here: a rule is certain). Capacities are ours
Expect:   held-out FineWeb-Edu 0.755 bits per byte, average accuracy 53.4, 6.0 bytes per chunk (H-Net paper, tables of
          the main results); not measured here
Cost:     not measured; reduced twin: recipes/hnet_space_tiny.py (CPU, minutes)
"""

from adaptive.layers.chunkers import space
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import attends, published, ruled, scans


def recipe() -> Recipe:
    return titled(
        ruled(scans(repeat=4), 1024, attends(1536, 4096, repeat=28), 1536, space.Settings(), 0.29),
        "hnet_space_l",
        "H-Net (space), size L (847M): a chunk after every space",
        published("0.755 bits per byte, average accuracy 53.4, 6.0 bytes per chunk"),
    )
