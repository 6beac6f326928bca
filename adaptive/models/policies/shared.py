"""The first pass alone is kept, and later passes read it (MoR paper, section 2.3: recursive sharing)."""

import dataclasses
from typing import Any, ClassVar

from adaptive.models.policies import Merging


@dataclasses.dataclass(frozen=True)
class Settings(Merging):
    """Exact where the model was trained so (keys_values=shared). Elsewhere each later pass reads keys that it never saw
    in training; looped models are known to fail with it (Ouro, arXiv 2510.25741)."""

    first_alone: ClassVar[bool] = True

    def refuse(self, recursive: Any) -> str:
        if recursive.keys_values == "shared":
            return ""
        if getattr(recursive.depth, "loop", False):
            return "depth.loop=true runs all passes alike"
        if not recursive.depth.capped:
            return f"depth={recursive.depth.kind()} runs all passes alike"
        return super().refuse(recursive)

    def exact(self, recursive: Any) -> bool:
        return recursive.keys_values == "shared" or super().exact(recursive)

    def caches(self, passes: int) -> int:
        return 1

    def cache(self, r: Any) -> Any:
        return 0
