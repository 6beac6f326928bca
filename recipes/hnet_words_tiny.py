"""H-Net on words: hnet_tiny's network, a chunk where the splitter of Hierarchical Autoregressive Transformers cuts.

python -m adaptive.train --recipe hnet_words_tiny
Numbers:  our own, for a CPU in minutes; network and capacity as in hnet_tiny, words as in arXiv 2501.10322
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.layers.chunkers import words
from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, titled
from adaptive.recipes.hnet_bases import tiny, tiny_stage


def recipe() -> Recipe:
    return titled(
        changed(tiny(tiny_stage(words.Settings(), 0.44)), data={"boundaries": "words"}),
        "hnet_words_tiny",
        "H-Net on the words of the embedded English text, for a CPU",
    )
