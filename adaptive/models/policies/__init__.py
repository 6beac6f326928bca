"""Policies: what a cache of generation keeps of a recursion's passes. One file each, found by its name, with a
dataclass `Settings` below `Policy`.

They stand on this floor, below `inference`, because a recursion makes its state by one (`BodyModule.empty`) and reads
it so in every pass; generation and serving choose one.
"""

import dataclasses
import re
from typing import Any, ClassVar

from adaptive.errors import RecipeError
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.settings import Member, check_ranges, hints, parse


@dataclasses.dataclass(frozen=True)
class Policy(Member):
    """Settings of a policy. `recursive` is always the settings of the body that it is for."""

    door: ClassVar[str] = __name__
    first_alone: ClassVar[bool] = False  # whether the first pass alone writes, and the others read what it wrote

    def refuse(self, recursive: Any) -> str:
        """Why it cannot run there; empty where it can."""
        return ""

    def exact(self, recursive: Any) -> bool:
        """Whether generation with it equals the full forward pass."""
        return True

    def caches(self, passes: int) -> int:
        """How many caches there are for so many passes."""
        return passes

    def cache(self, r: Any) -> Any:
        """The cache of pass r, a number or traced."""
        return r

    def slots(self, recursive: Any, slots: int) -> tuple[int, ...] | None:
        """Slots of each cache where `slots` positions are to have room and caches differ; None: they do not."""
        return None

    def describe(self) -> str:
        """Its name, with its one number where it has one."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return self.kind() + (f"({values[0]:g})" if values else "")


class Merging(Policy):
    """Passes share caches that they were not trained to share."""

    def refuse(self, recursive: Any) -> str:
        if recursive.keys_values != "per_recursion":
            return f"keys_values={recursive.keys_values} has no keys and values of its own in every pass to choose from"
        if not all(b.mixer is None or isinstance(b.mixer, Attention) for b in recursive.core.blocks):
            return "passes can share what attention keeps alone, and the core has other mixers"
        if recursive.shared == "none":
            return "its passes have parameters of their own (shared=none): one cannot read what another keeps"
        return ""

    def exact(self, recursive: Any) -> bool:
        return recursive.recursions == 1


def refusal(policy: Policy, recursive: Any) -> str:
    """Why a recursion cannot have a policy, and which it can; empty where it can."""
    if recursive.order == "sequence" and recursive.recursions > 1:
        why = "order=sequence has no cache"
        return "" if policy.kind() == "per_pass" else f"{why}; it can be per_pass, which means nothing there"
    why = policy.refuse(recursive)
    return f"{why}; it can be {', '.join(p.kind() for p in possible(recursive))}" if why else ""


def possible(recursive: Any) -> list[Policy]:
    """The policies that a recursion can have, with their usual settings."""
    every = [Policy.member(kind)() for kind in Policy.kinds()]
    return [policy for policy in every if not policy.refuse(recursive)]


def named(text: str, where: str) -> Policy:
    """The policy that a text names: `last`, or `cycle(3)` with its one number. `where` begins messages.

    Raises RecipeError.
    """
    found = re.fullmatch(r"([^()]*)(?:\((.*)\))?", text)
    if found is None:
        raise RecipeError(f"{where} {text}: expected a name, or a name and a number as in cycle(3)")
    kind = Policy.member(found[1], where=where)
    fields = dataclasses.fields(kind)
    if found[2] is None:
        return kind()
    if not fields:
        raise RecipeError(f"{where} {text}: {found[1]} has no number")
    value = parse(hints(kind)[fields[0].name], found[2], where=f"{where} {found[1]}: {fields[0].name}")
    made: Policy = kind(**{fields[0].name: value})
    check_ranges(made, f"{where} {found[1]}: ")
    return made
