"""What a model's settings say, as evaluation, alarms, plans and reports ask for it: no part of them names a model."""

from typing import Any, NamedTuple

from adaptive.layers.moe.settings import MoESettings
from adaptive.layers.stack import Settings as Stack
from adaptive.models.bodies import hnet, recursive
from adaptive.settings import nodes


class Experts(NamedTuple):
    """Routed feed-forwards of one block of a stack.

    path      in the model's told (`Trace.told`)
    setting   dotted path of their settings
    settings  of each
    layers    their numbers, each pass of a recursion apart, in the order they run; counted within the body they are in
    """

    path: str
    setting: str
    settings: MoESettings
    layers: tuple[int, ...]


class Facts(NamedTuple):
    """family, title: what the model is called, in a word and for people.

    recursions  passes that count as depth; 1: none
    depth       kind of the depth strategy; "none" where every position takes the same path
    stops       whether its scores are for stopping at a pass, not for taking it
    recursion   dotted path of the recursive body; "": there is none
    chunking    (dotted path, settings) of every chunking stage, from the outside in
    experts     of every stack, in the order they run
    kernels     operations that the model computes with, each a package of `kernels_pallas` or "routing"
    """

    family: str
    title: str
    recursions: int
    depth: str
    stops: bool
    recursion: str
    chunking: tuple[tuple[str, Any], ...]
    experts: tuple[Experts, ...]
    kernels: tuple[str, ...]


def facts_of(model: Any, at: str) -> Facts:
    """The facts of a model's settings, whose own dotted path is `at`."""
    recursions, depth, stops, recursion, chunking = 1, "none", False, "", []
    kernels: dict[str, None] = {}
    for path, node in nodes(model, at):
        kernels |= dict.fromkeys(node.kernels() if hasattr(node, "kernels") else ())
        if isinstance(node, recursive.Settings) and not recursion:
            recursions, recursion = node.counted(), path
            depth, stops = "none" if node.depth.equal_passes else node.depth.kind(), node.depth.stops
        if isinstance(node, hnet.Settings):
            chunking.append((path, node))
    experts = tuple(_experts(model.body, f"{at}.body", ""))
    family, title = model.body.family(), model.body.title()
    return Facts(family, title, recursions, depth, stops, recursion, tuple(chunking), experts, tuple(kernels))


def _experts(body: Any, at: str, path: str) -> list[Experts]:
    """Of a body at dotted path `at` whose parts are told below `path`."""
    found: list[Experts] = []
    first = 0
    for name in ("stack", "encoder", "prelude", "core", "inner", "decoder", "coda"):
        part = getattr(body, name, None)
        if part is None:
            continue
        if name == "inner":
            found += _experts(part, f"{at}.inner", f"{path}inner/")
            continue
        passes = body.recursions if name == "core" else 1
        found += _of_stack(part, f"{at}.{name}", f"{path}{name}/", first, passes)
        first += passes * part.layers
    return found


def _of_stack(stack: Stack, at: str, path: str, first: int, passes: int) -> list[Experts]:
    found = []
    for i, block in enumerate(stack.blocks):
        if isinstance(block.feed_forward, MoESettings):
            numbers = stack.numbers(i, first)
            layers = tuple(n + r * stack.layers for r in range(passes) for n in numbers)
            found.append(
                Experts(f"{path}blocks/{i}/feed_forward", f"{at}.blocks.{i}.feed_forward", block.feed_forward, layers)
            )
    return found
