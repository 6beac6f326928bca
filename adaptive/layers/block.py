"""One block: norm, mixer, norm, feed-forward, each pair with a residual path around it."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.call import Call, Tales, Told
from adaptive.layers.cost import Cost, Span
from adaptive.layers.feed_forwards import FeedForward, FeedForwardModule, dense
from adaptive.layers.mixers import Mixer, MixerModule, attention
from adaptive.layers.norm import RMSNorm
from adaptive.layers.site import Site
from adaptive.layers.state import State, Within
from adaptive.layers.where import Where
from adaptive.parallel.rules import constrain
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings:
    """`repeat` equal blocks in a row."""

    mixer: Mixer | None = attention.Settings()
    feed_forward: FeedForward | None = dense.Settings()
    repeat: int = ranged(1, least=1, most=10_000)

    @property
    def additions(self) -> int:
        """How often these blocks add to the residual stream."""
        return self.repeat * ((self.mixer is not None) + (self.feed_forward is not None))

    def check(self, width: int, at: str) -> None:
        if self.mixer is None and self.feed_forward is None:
            raise RecipeError(f"{at}: a block needs a mixer or a feed-forward; both are none")
        if self.mixer is not None:
            self.mixer.check(width, f"{at}.mixer")
        if self.feed_forward is not None:
            self.feed_forward.check(width, f"{at}.feed_forward")

    def sizes(self, width: int) -> tuple[int, int]:
        """Parameters of one layer: (of the mixer, of the feed-forward), each with its norm."""
        mixes, feeds = self.mixer, self.feed_forward
        return (
            0 if mixes is None else width + mixes.parameters(width),
            0 if feeds is None else width * (not feeds.own_norm()) + feeds.parameters(width),
        )

    def cost(self, span: Span, site: Site) -> Cost:
        """FLOPs of one layer, on average over the layers of `site`."""
        parts = [] if self.mixer is None else [self.mixer.cost(site.width, span)]
        if self.feed_forward is not None:
            parts.append(self.feed_forward.cost(span.queries, site))
        return dataclasses.replace(sum(parts, start=Cost()), last=parts[-1].last)


class Block(nnx.Module):
    """h = x + mixer(norm(x)); h + feed_forward(norm(h)); either may be missing.

    Holds the parameters of all layers that a scan runs over, and is applied one slice at a time.
    """

    def __init__(self, settings: Settings, mixer_site: Site, site: Site, key: jax.Array, dtype: Any):
        """mixer_site, site: of the mixer and of the feed-forward, which differ where passes of a recursion share the
        former alone."""
        mixer, feed_forward = jax.random.split(key)
        width, eps = site.width, site.norm_eps
        mixes, feeds = settings.mixer, settings.feed_forward
        self.mixer_norm = None if mixes is None else RMSNorm(width, eps, mixer_site.stack)
        self.mixer: MixerModule | None = None if mixes is None else mixes.build(mixer_site, mixer)
        made = None if feeds is None else feeds.build(site, feed_forward)
        normed = feeds is not None and not feeds.own_norm()
        self.feed_forward_norm = RMSNorm(width, eps, site.stack) if normed else None
        self.feed_forward: FeedForwardModule | None = made
        self.dtype = dtype

    def __call__(
        self, x: jax.Array, where: Where, call: Call, state: State | None
    ) -> tuple[jax.Array, State, Tales, jax.Array | None]:
        """x [rows, n, width], the residual stream -> (the stream after the block, the mixer's state, what was done,
        logits of the feed-forward's router)."""
        told: Tales = {}
        logits = None
        if self.mixer is not None and self.mixer_norm is not None:
            normed = self.mixer_norm(x).astype(self.dtype)
            if isinstance(state, Within) and not self.mixer.in_place:
                update, after, own = self.mixer(normed, where, call, state.own())
                state = state.replaced(after)
            else:
                update, state, own = self.mixer(normed, where, call, state)
            x = x + update.astype(x.dtype)
            told |= _named("mixer", own)
        if self.feed_forward is not None:
            h = x if self.feed_forward_norm is None else self.feed_forward_norm(x)
            update, own, logits = self.feed_forward.apply(h.astype(self.dtype), where, call)
            x = x + update.astype(x.dtype)
            told |= _named("feed_forward", own)
        return constrain(x, "batch", "seq", None), state, told, logits

    @property
    def reads_previous(self) -> int:
        """Columns of the router logits of the layer below that its router reads; 0: it reads none."""
        routed = self.feed_forward
        return routed.choices if routed is not None and routed.reads_previous else 0


def _named(name: str, told: Told) -> Tales:
    return {name: told} if told else {}
