"""H-Net of two stages on bytes: chunks of chunks, about 3 by 3 bytes.

python -m adaptive.train --recipe hnet_2stage_tiny
Numbers:  our own, for a CPU in minutes; kinds and training as in hnet_2stage_l
Expect:   held-out bits per byte 2.47 at step 200 and 2.17 at the end, 8.1 bytes per chunk
          (2026-11-21, one CPU device, jax 0.10.2)
Cost:     as many training FLOPs as bytes_tiny and hnet_tiny (the account says 9 TFLOPs); not yet timed
"""

from adaptive.recipe import Recipe
from recipes.bases import titled
from recipes.hnet_bases import chunks, tiny


def recipe() -> Recipe:
    return titled(
        tiny(
            '["m2", ["T1m1", ["T4"], "m1T1"], "m2"]',
            (128, 128, 192),
            (0, 384, 512),
            *chunks("dynamic", (3, 3), (0.5, 0.65)),
        ),
        "hnet_2stage_tiny",
        "H-Net, two stages, on the embedded English text, for a CPU",
    )
