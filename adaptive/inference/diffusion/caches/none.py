"""No cache: every call computes everything."""

import dataclasses

from adaptive.inference.diffusion.caches import Cache, Now, Pass


@dataclasses.dataclass(frozen=True)
class Settings(Cache):
    """Every position at each call."""

    exact = True
    in_blocks = None

    def computes(self, now: Now) -> Pass:
        return Pass(now.exists, now.exists)
