"""MoR out of SmolLM2-135M: its first and its last layer, and 14 layers between them for two recursions (57M).

python -m adaptive.train --recipe mor_135m_uptrain     # from nothing; else
python -m adaptive.convert --from FOLDER_OR_GGUF --workdir runs/smollm2
python -m adaptive.convert --uptrain runs/smollm2 --recipe mor_135m_uptrain --workdir runs/mor_135m_uptrain
python -m adaptive.train --recipe runs/mor_135m_uptrain/recipe.json --workdir runs/mor_135m_uptrain
Numbers:  shape of SmolLM2-135M; rate 2e-4 under a cosine after 200 steps of warm-up, as Relaxed Recursive Transformers
          are uptrained (arXiv 2410.20672, appendix on set-up); rows, batch and steps are our own, for a CPU
Expect:   not measured
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.data.config import DATA_PRESETS
from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, llama_135m, mor, steps, titled


def recipe() -> Recipe:
    made = changed(
        mor(llama_135m(rope_theta=1e5), 2),
        data={**DATA_PRESETS["embedded"], "seq_len": 512},
        optimizer={"learning_rate": 2e-4},
        schedule={"kind": "cosine"},
        train={"batch_size": 4, "device_batch_size": 0, "remat": "none"},
        eval={"every": 100, "rows": 64},
        checkpoint={"every": 100},
    )
    return titled(steps(made, 1000, 200), "mor_135m_uptrain", "MoR out of SmolLM2-135M, 1 + 14 x 2 + 1 layers (57M)")
