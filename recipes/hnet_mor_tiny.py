"""An H-Net around a Mixture-of-Recursions: chunks of about 4 bytes, each through a shared block up to 3 times.

python -m adaptive.train --recipe hnet_mor_tiny
Numbers:  our own, for a CPU in minutes; outer stage as in hnet_tiny, routing as in mor_360m
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.recipe import Recipe
from recipes.bases import mor, titled
from recipes.hnet_bases import TINY_FLOPS, budgeted, chunks, tiny


def recipe() -> Recipe:
    network = tiny('["m2", ["model"], "m2"]', (128, 192), (0,), *chunks("dynamic", (4,), (0.44,))).with_(
        "model.hidden_size=192",
        "model.intermediate_size=512",
        "model.num_layers=5",
        "model.num_heads=6",
        "model.num_kv_heads=2",
        "model.head_dim=32",
    )
    return titled(
        budgeted(mor(network, 3), TINY_FLOPS),
        "hnet_mor_tiny",
        "Mixture-of-Recursions on chunks of the embedded English text, for a CPU",
    )
