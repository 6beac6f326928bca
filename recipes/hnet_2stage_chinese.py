"""H-Net of two chunking stages on Chinese, size XL with T30 inside (1.76B).

python -m adaptive.train --recipe hnet_2stage_chinese
Numbers:  released configuration hnet_2stage_XL_chinese; training from the H-Net paper, section 3, hnet_bases.py names
          the source of each. Steps: 46B tokens at 3.62 bytes, derived (which tokenizer counted them is UNCONFIRMED);
          the hub's name of the data set is UNCONFIRMED; capacities are ours, wider than for English
Expect:   0.7032 bits per byte, XWinograd-zh 0.663, 5.81 bytes per innermost chunk (H-Net paper, table on Chinese and
          code); not measured here
Cost:     not measured; reduced twin: recipes/hnet_2stage_tiny.py with data.paths=chinese (CPU, minutes)
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, titled
from adaptive.recipes.hnet_bases import CHINESE_STEPS, RATE_XL, elsewhere, two_stages


def recipe() -> Recipe:
    return titled(
        changed(
            two_stages(30, (1536, 2048), (4096, 5504), RATE_XL, count=CHINESE_STEPS, settled=0.6),
            data={"paths": ("opencsg/Fineweb-Edu-Chinese-V2.1",)},
        ),
        "hnet_2stage_chinese",
        "H-Net, two stages, size XL, on Chinese (1.76B)",
        elsewhere("0.7032 bits per byte, XWinograd-zh 0.663, 5.81 bytes per innermost chunk"),
    )
