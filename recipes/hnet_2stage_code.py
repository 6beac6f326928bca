"""H-Net of two chunking stages on code, size XL with T28 inside (1.65B).

python -m adaptive.train --recipe hnet_2stage_code
Numbers:  released configuration hnet_2stage_XL_code; training from the H-Net paper, section 3, hnet_bases.py names
          the source of each. Steps: 46B tokens at 3.58 bytes, derived (which tokenizer counted them is UNCONFIRMED).
          The paper read the GitHub part of the Pile, which is no longer distributed; this reads Python alone,
          codeparrot-clean, so the printed number is not comparable. Capacities are ours
Expect:   0.3161 bits per byte on the Pile's GitHub, 7.23 bytes per innermost chunk (H-Net paper, table on Chinese and
          code); not measured here
Cost:     not measured; reduced twin: recipes/hnet_2stage_tiny.py with data.paths=python (CPU, minutes)
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, titled
from adaptive.recipes.hnet_bases import CODE_STEPS, RATE_XL, elsewhere, two_stages


def recipe() -> Recipe:
    return titled(
        changed(
            two_stages(28, (1536, 2048), (4096, 5504), RATE_XL, count=CODE_STEPS),
            data={"paths": ("codeparrot/codeparrot-clean",), "text_key": "content"},
        ),
        "hnet_2stage_code",
        "H-Net, two stages, size XL, on code (1.65B)",
        elsewhere("0.3161 bits per byte, 7.23 bytes per innermost chunk", "of the Pile's GitHub, not of this data"),
    )
