"""A byte-level transformer of 5 layers, width 128: what the tiny H-Nets are compared with.

python -m adaptive.train --recipe bytes_tiny
Numbers:  our own, for a CPU in minutes; the network of vanilla_tiny at the best rate tried. It learned faster than one
          with the H-Nets' blocks and initialisation (2.24 bits per byte against 2.29 after 580 steps)
Expect:   held-out bits per byte 2.62 at step 300 and 2.20 at the end (2026-11-21, one CPU device, jax 0.10.2)
Cost:     as many training FLOPs as hnet_tiny and hnet_2stage_tiny (the account says 9 TFLOPs); not yet timed
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, tiny, titled
from adaptive.recipes.hnet_bases import TINY_FLOPS, budgeted


def recipe() -> Recipe:
    network = changed(
        tiny(),
        model={"vocab_size": 256},
        data={"tokenizer": "hnet-bytes"},
        optimizer={"learning_rate": 3e-3},
        schedule={"decay_shape": "sqrt"},
    )
    return titled(
        budgeted(network, TINY_FLOPS),
        "bytes_tiny",
        "Transformer on the bytes of the embedded English text, for a CPU",
    )
