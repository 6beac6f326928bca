"""dKV-Cache-Decode (Ma et al. 2025, arXiv 2505.15781): a token's keys and values are kept one call after it is written,
since they change most when it is."""

import dataclasses

from adaptive.inference.diffusion.caches import Cache, Now, Pass
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Cache):
    """Masked positions and those that the call before wrote are computed; every `refresh` calls everything is."""

    refresh: int = ranged(8, least=1)  # the paper's for LLaDA; 4 for Dream

    def computes(self, now: Now) -> Pass:
        everything = now.calls % self.refresh == 0
        return Pass(now.exists & (everything | now.masked | now.fresh), now.exists)
