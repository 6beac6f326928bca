"""H-Net of two stages on bytes: chunks of chunks, about 3 by 3 bytes.

python -m adaptive.train --recipe hnet_2stage_tiny
Numbers:  our own, for a CPU in minutes; kinds and training as in hnet_2stage_l
Expect:   held-out bits per byte 2.47 at step 200 and 2.17 at the end, 8.1 bytes per chunk
          (2026-11-21, one CPU device, jax 0.10.2)
Cost:     as many training FLOPs as bytes_tiny and hnet_tiny (the account says 9 TFLOPs); not yet timed
"""

from adaptive.layers.chunkers import dynamic
from adaptive.models.bodies import hnet, plain
from adaptive.recipe import Recipe
from recipes.bases import titled
from recipes.hnet_bases import repeated, stacked, tiny, tiny_attends, tiny_scans


def recipe() -> Recipe:
    side = tiny_attends(128, 384, window=128)
    second = hnet.Settings(
        encoder=stacked(side, tiny_scans(1)),
        chunker=dynamic.Settings(target=3.0),
        inner=plain.Settings(repeated(tiny_attends(192, 512, repeat=4))),
        inner_width=192,
        decoder=stacked(tiny_scans(1), side),
        capacities=(0.65,),
        rate=1.5,
    )
    body = hnet.Settings(
        encoder=repeated(tiny_scans(2)),
        chunker=dynamic.Settings(target=3.0),
        inner=second,
        inner_width=128,
        decoder=repeated(tiny_scans(2)),
        capacities=(0.5,),
        rate=2.0,
    )
    return titled(tiny(body), "hnet_2stage_tiny", "H-Net, two stages, on the embedded English text, for a CPU")
