"""Small models for tests, from flat arguments: `plain`, `recursive`, `mor` and `hnet` give settings, `reduced` shrinks
others to their size. `wrapped` makes a model of any body, `with_body` changes it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from adaptive import settings as trees
from adaptive.layers import block as blocks
from adaptive.layers import stack as stacks
from adaptive.layers.chunkers import Chunker
from adaptive.layers.feed_forwards import FeedForward, dense
from adaptive.layers.mixers import Mixer, attention, mamba2
from adaptive.models import language_model
from adaptive.models.bodies import Body
from adaptive.models.bodies import hnet as hnet_body
from adaptive.models.bodies import plain as plain_body
from adaptive.models.bodies import recursive as recursive_body
from adaptive.models.depth import Depth

Model = language_model.Settings
# Weights larger than a real model's, so that attention and routers decide something at this size.
LANGUAGE: dict[str, Any] = {"vocab_size": 40, "width": 32, "init_std": 0.2, "embedding_std": 0.2}
BYTES: dict[str, Any] = {"vocab_size": 256, "width": 8, "tie_embeddings": False, "init_std": 0.2, "embedding_std": 1.0}


def wrapped(body: Body, **language: Any) -> Model:
    """A model of this body; `language` are its other settings, by default those of `LANGUAGE`."""
    settings = Model(body=body, **(LANGUAGE | language))
    settings.validate()
    return settings


def block(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    hidden: int = 48,
    repeat: int = 1,
    mixer: Mixer | str | None = "attention",
    feed_forward: FeedForward | str | None = "dense",
    **attends: Any,
) -> blocks.Settings:
    """A block of attention and a dense feed-forward, or of the given parts; `attends` are further settings of
    attention."""
    if mixer == "attention":
        mixer = attention.Settings(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **attends)
    elif mixer == "mamba2":
        mixer = mamba2.Settings(d_state=4, head_dim=8, block=8)
    if feed_forward == "dense":
        feed_forward = dense.Settings(hidden=hidden)
    return blocks.Settings(mixer=mixer, feed_forward=feed_forward, repeat=repeat)


def plain(layers: int = 4, **shape: Any) -> Model:
    """A plain transformer. Shape: arguments of `block`, and of the model: width=32, vocab_size=40, ..."""
    own, language = _divided(shape)
    return wrapped(plain_body.Settings(stacks.Settings((block(**own),), repeats=layers)), **language)


def recursive(
    layers: int = 5,
    recursions: int = 3,
    *,
    ends: int = 1,
    depth: Depth | str = "all",
    pattern: Sequence[blocks.Settings] = (),
    shared: Any = "all",
    order: Any = "cycle",
    keys_values: Any = "per_recursion",
    **shape: Any,
) -> Model:
    """A recursion whose unrolled network has `layers` layers, of which `ends` come before it and as many after it.

    depth    a strategy's settings, or its kind for the defaults
    pattern  blocks of the core, instead of the one that the shape describes
    shape    as of `plain`
    """
    own, language = _divided(shape)
    core = tuple(pattern) or (block(**own),)
    repeats, rest = divmod(layers - 2 * ends, recursions * sum(b.repeat for b in core))
    assert repeats and not rest, f"{layers} layers, {ends} at each end, do not hold {recursions} recursions of the core"
    end = stacks.Settings((block(**own),), repeats=ends) if ends else None
    if isinstance(depth, str):
        depth = Depth.member(depth)()
    core = stacks.Settings(core, repeats=repeats)
    return wrapped(
        recursive_body.Settings(end, core, end, recursions, depth, shared, order, keys_values),
        **language,
    )


def mor(layers: int = 5, recursions: int = 3, depth: Depth | str = "expert_choice", **options: Any) -> Model:
    """A Mixture-of-Recursions: `recursive` with a router of depth."""
    return recursive(layers, recursions, depth=depth, **options)


def hnet(
    layout: Sequence[Any] = ("m1", ("T1",), "t1"),
    *,
    widths: int | tuple[int, ...] = (8, 12, 16, 16),
    heads: int | tuple[int, ...] = 2,
    hidden: int | tuple[int, ...] = 20,
    rotary_dim: int | tuple[int, ...] = 2,
    window: int | tuple[int, ...] = 0,
    d_state: int = 4,
    ssm_head_dim: int = 4,
    ssm_block: int = 8,
    chunker: Chunker | str | tuple[Chunker | str, ...] = "dynamic",
    target: float | tuple[float, ...] = 3.0,
    capacities: tuple[float, ...] = (),
    rates: tuple[float, ...] = (),
    merge: Any = "boundary",
    packing: Any = "row",
    **language: Any,
) -> Model:
    """A model of bytes that chunks: `layout` is the paper's, (encoder, (inside,), decoder), with runs such as "T2m1" of
    blocks: T, t with attention, M, m with Mamba-2, capital letters with a feed-forward. Inside may be any body.

    A tuple of numbers or chunkers has one for each stage from the bytes in; one alone is for all. capacities: of each
    chunking stage, () for all; rates: multiples of the learning rate, of each chunking stage and the network inside.
    """

    def at(values: Any, stage: int) -> Any:
        return values[stage] if isinstance(values, tuple) else values

    def stack(runs: str, stage: int) -> stacks.Settings:
        width = at(widths, stage)
        mixers = {
            "t": attention.Settings(
                heads=at(heads, stage),
                kv_heads=0,
                head_dim=width // at(heads, stage),
                rotary_dim=at(rotary_dim, stage),
                window=at(window, stage),
            ),
            "m": mamba2.Settings(d_state=d_state, head_dim=ssm_head_dim, block=ssm_block),
        }
        feed = dense.Settings(hidden=at(hidden, stage))
        pairs = [(runs[i], int(runs[i + 1])) for i in range(0, len(runs), 2)]
        made = [blocks.Settings(mixers[a.lower()], feed if a.isupper() else None, repeat=n) for a, n in pairs]
        return stacks.Settings(tuple(made), stream="float32", scale_residual=True)

    def body(layout: Any, stage: int) -> Body:
        if isinstance(layout, Body):
            return layout
        if len(layout) == 1:
            only = layout[0]
            return only if isinstance(only, Body) else plain_body.Settings(stack(only, stage))
        encoder, inside, decoder = layout
        own = at(chunker, stage)
        if isinstance(own, str):
            own = _chunker(own, at(target, stage))
        inner = body(inside, stage + 1)
        last = not isinstance(inner, hnet_body.Settings)
        return hnet_body.Settings(
            encoder=stack(encoder, stage),
            chunker=own,
            inner=inner,
            inner_width=at(widths, stage + 1),
            decoder=stack(decoder, stage),
            merge=merge,
            packing=packing,
            capacities=capacities[stage : stage + 1],
            rate=rates[stage] if rates else 1.0,
            inner_rate=rates[stage + 1] if rates and last else 1.0,
        )

    return wrapped(body(layout, 0), **(BYTES | {"width": at(widths, 0)} | language))


def with_body(model: Model, **changes: Any) -> Model:
    """The model with fields of its body changed."""
    settings = dataclasses.replace(model, body=dataclasses.replace(model.body, **changes))
    settings.validate()
    return settings


def of_two_passes(body: recursive_body.Settings) -> recursive_body.Settings:
    """The recursion with its first two passes alone; blocks that only some tokens enter stay all there."""
    if body.depth.kind() == "mixture_of_depths":
        return body
    depth = body.depth
    if capacities := getattr(depth, "capacities", ()):
        depth = dataclasses.replace(depth, capacities=capacities[:2])
    return dataclasses.replace(body, depth=depth, recursions=min(body.recursions, 2))


def reduced(model: Model, *, width: int = 16, layers: int = 2, **language: Any) -> Model:
    """The same model at the size of a test: everything that has a size is small, what decides stays as it is.

    Stacks keep their pattern and at most `layers` repeats; streams that widen inwards still do.
    """
    small = {
        "heads": lambda n: min(n, 4),
        "kv_heads": lambda n: min(n, 2),
        "head_dim": lambda n: 8,
        "rotary_dim": lambda n: min(n, 4),
        "window": lambda n: min(n, 5),
        "d_state": lambda n: 4,
        "block": lambda n: 8,
        "hidden": lambda n: 24,
        "expert_size": lambda n: 8,
        "shared_size": lambda n: min(n, 8),
        "small_size": lambda n: min(n, 4),
        "gate_size": lambda n: 4,
        "cosine_size": lambda n: 8,
        "repeat": lambda n: min(n, layers),
        "repeats": lambda n: min(n, layers),
    }
    body = _shrunk(model.body, small)
    own = {"vocab_size": min(model.vocab_size, 256), "init_std": 0.2, "embedding_std": 0.5} | language
    settings = dataclasses.replace(model, width=width, body=_narrowed(body, width, 8), **own)
    settings.validate()
    return settings


# Parts


def _divided(shape: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `block`, and settings of the model."""
    names = {field.name for field in dataclasses.fields(Model)}
    own = {name: value for name, value in shape.items() if name not in names}
    return own, {name: value for name, value in shape.items() if name in names}


def _chunker(kind: str, target: float) -> Chunker:
    """A chunker of this kind with about so many positions per chunk, where it asks."""
    settings = Chunker.member(kind)
    names = {field.name for field in dataclasses.fields(settings)}
    return settings(**{"target": target} if "target" in names else {"length": int(target)} if "length" in names else {})


def _shrunk(node: Any, small: dict[str, Callable[[int], int]]) -> Any:
    """The tree with every whole number of a name in `small` changed."""
    if isinstance(node, tuple):
        return tuple(_shrunk(item, small) for item in node)
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    changes = {}
    for field, kind, value in trees.fields(node):
        changes[field.name] = small[field.name](value) if field.name in small and kind is int else _shrunk(value, small)
    new = dataclasses.replace(node, **changes)
    router = getattr(new, "router", None)
    if router is not None and hasattr(router, "hidden"):  # experts that are slices of one feed-forward
        new = dataclasses.replace(new, router=dataclasses.replace(router, hidden=new.experts * new.expert_size))
    return new


def _narrowed(body: Body, width: int, more: int) -> Body:
    """The body in a stream of `width`; each stage inside that was wider than the one around it has `more`."""
    if not isinstance(body, hnet_body.Settings):
        return body
    inside = width + more if body.inner_width else width
    return dataclasses.replace(body, inner_width=inside, inner=_narrowed(body.inner, inside, more))
