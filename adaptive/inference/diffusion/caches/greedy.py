"""dKV-Cache-Greedy (Ma et al. 2025, arXiv 2505.15781): a call computes a few positions, whatever the length is."""

import dataclasses

from adaptive.errors import UserError
from adaptive.inference.diffusion.caches import Cache, Now, Pass
from adaptive.inference.diffusion.policies import Policy, random
from adaptive.inference.diffusion.policies.propagation import around
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Cache):
    """Positions that the call before wrote, those that this one will, and what is at most `window` away from these;
    every `refresh` calls everything."""

    refresh: int = ranged(2, least=1)
    window: int = ranged(3, least=0)

    def check(self, policy: Policy, most: int) -> None:
        if not isinstance(policy, random.Settings):
            raise UserError(
                f"cache greedy computes what a call will write, and policy {policy.kind()} cannot tell that before: "
                "take policy random, or cache delayed"
            )

    def computes(self, now: Now) -> Pass:
        assert now.next is not None
        few = now.fresh | around(now.next, self.window)
        return Pass(now.exists & ((now.calls % self.refresh == 0) | few), now.exists)
