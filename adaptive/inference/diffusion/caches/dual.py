"""The dual cache of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618): of what is before a block and of what follows it."""

import dataclasses

from adaptive.inference.diffusion.caches import Cache, Now, Pass


@dataclasses.dataclass(frozen=True)
class Settings(Cache):
    """The first call of a block computes everything, others the block alone."""

    together = True

    def computes(self, now: Now) -> Pass:
        return Pass(now.exists & ((now.step == 0) | (now.ago == 0)), now.exists)
