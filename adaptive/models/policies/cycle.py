"""Pass r has cache r mod m, where it replaces what pass r - m kept (Huginn's compressed cache)."""

import dataclasses
from typing import Any

from adaptive.models.policies import Merging
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Merging):
    """Of earlier positions a pass reads what the last pass of its turn left, or, of a token that stopped before, what
    its own last one did. Inexact; tokens of one prompt read each other as in the full forward pass, because a whole
    piece of it goes through a pass together."""

    number: int = ranged(2, least=1)  # of caches

    def exact(self, recursive: Any) -> bool:
        return recursive.recursions <= self.number

    def caches(self, passes: int) -> int:
        return min(self.number, passes)

    def cache(self, r: Any) -> Any:
        return r % self.number
