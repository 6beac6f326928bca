"""H-Net of two stages on bytes: chunks of chunks, about 3 by 3 bytes.

python -m adaptive.train --recipe hnet_2stage_tiny
Numbers:  our own, for a CPU in minutes; kinds and training as in hnet_2stage_l
Expect:   held-out bits per byte 2.47 at step 200 and 2.17 at the end, 8.1 bytes per chunk
          (2026-11-21, one CPU device, jax 0.10.2)
Cost:     as many training FLOPs as bytes_tiny and hnet_tiny (the account says 9 TFLOPs); not yet timed
"""

from adaptive.models.bodies import plain
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import repeated, tiny, tiny_attends, tiny_two_stages


def recipe() -> Recipe:
    inside = plain.Settings(repeated(tiny_attends(192, 512, repeat=4)))
    return titled(
        tiny(tiny_two_stages(inside)), "hnet_2stage_tiny", "H-Net, two stages, on the embedded English text, for a CPU"
    )
