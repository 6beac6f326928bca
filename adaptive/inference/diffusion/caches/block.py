"""The exact cache of block diffusion (BD3-LM, Arriola et al. 2025, arXiv 2503.09573): finished blocks do not see later
ones, so that their keys and values stay."""

import dataclasses

from adaptive.inference.diffusion.caches import Cache, Now, Pass


@dataclasses.dataclass(frozen=True)
class Settings(Cache):
    """A call computes its block, the first call of one also the block before, as it was written in the end."""

    exact = True
    in_blocks = True

    def computes(self, now: Now) -> Pass:
        past = now.exists & (now.ago >= 0)
        anew = (now.ago == 0) | ((now.ago == 1) & (now.step == 0))
        return Pass(past & (anew | ~now.held), past)
