"""Every pass has a cache of its own, of all positions: what a recursion is trained with."""

import dataclasses

from adaptive.models.policies import Policy


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """Exact. Where passes share keys and values by training (keys_values=shared) there is one cache."""
