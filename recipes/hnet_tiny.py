"""H-Net on bytes: two Mamba-2 layers before and after, four transformer layers inside on chunks of about 4.

python -m adaptive.train --recipe hnet_tiny
Numbers:  our own, for a CPU in minutes; kinds and training as in hnet_1stage_l
Expect:   held-out bits per byte 2.48 at step 200 and 2.12 at the end, 3.7 bytes per chunk
          (2026-11-21, one CPU device, jax 0.10.2)
Cost:     as many training FLOPs as bytes_tiny and hnet_2stage_tiny (the account says 9 TFLOPs); not yet timed
"""

from adaptive.layers.chunkers import dynamic
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import tiny, tiny_stage


def recipe() -> Recipe:
    return titled(
        tiny(tiny_stage(dynamic.Settings(target=4.0), 0.44)),
        "hnet_tiny",
        "H-Net, one stage, on the embedded English text, for a CPU",
    )
