"""One block: norm, mixer, norm, feed-forward, each pair with a residual path around it."""

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.call import Call, Tales, Told
from adaptive.layers.cost import Cost, Span
from adaptive.layers.feed_forwards import FeedForward, FeedForwardModule, dense
from adaptive.layers.mixers import Mixer, MixerModule, attention
from adaptive.layers.norm import Kind, LayerNorm, RMSNorm, make_norm, norm_size
from adaptive.layers.site import Site
from adaptive.layers.state import State, Within
from adaptive.layers.where import Where
from adaptive.parallel.rules import constrain
from adaptive.settings import ranged, since


@dataclasses.dataclass(frozen=True)
class Settings:
    """`repeat` equal blocks in a row."""

    mixer: Mixer | None = attention.Settings()
    feed_forward: FeedForward | None = dense.Settings()
    repeat: int = ranged(1, least=1, most=10_000)
    norm: Kind = since(
        "rms", before="rms"
    )  # LayerNorm has a bias as well (GPT-2); that behind a stack is its last block's
    # Whether norms are before the mixer and the feed-forward, behind each of them (OLMo 2), or both (Gemma).
    norms_at: Literal["input", "output", "both"] = since("input", before="input")

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
            if self.feed_forward.own_norm() and self.norms_at != "input":
                raise RecipeError(
                    f"{at}.norms_at={self.norms_at}: {self.feed_forward.kind()} normalises its input itself; only input"
                )

    def sizes(self, width: int) -> tuple[int, int]:
        """Parameters of one layer: (of the mixer, of the feed-forward), each with its norm."""
        mixes, feeds = self.mixer, self.feed_forward
        norms = norm_size(self.norm, width) * (2 if self.norms_at == "both" else 1)
        return (
            0 if mixes is None else norms + mixes.parameters(width),
            0 if feeds is None else norms * (not feeds.own_norm()) + feeds.parameters(width),
        )

    def cost(self, span: Span, site: Site) -> Cost:
        """FLOPs of one layer, on average over the layers of `site`."""
        parts = [] if self.mixer is None else [self.mixer.cost(site.width, span)]
        if self.feed_forward is not None:
            parts.append(self.feed_forward.cost(span.queries, site))
        total = dataclasses.replace(sum(parts, start=Cost()), last=parts[-1].last)
        # The gradient of a norm behind needs what the last matmul gave.
        return total if self.norms_at == "input" else dataclasses.replace(total, last=0.0, experts_last=0.0)


class Block(nnx.Module):
    """h = x + mixer(norm(x)); h + feed_forward(norm(h)); either may be missing, and norms may stand behind instead.

    Holds the parameters of all layers that a scan runs over, and is applied one slice at a time.
    """

    def __init__(self, settings: Settings, mixer_site: Site, site: Site, key: jax.Array, dtype: Any):
        """mixer_site, site: of the mixer and of the feed-forward, which differ where passes of a recursion share the
        former alone."""
        mixer, feed_forward = jax.random.split(key)
        width, eps = site.width, site.norm_eps
        mixes, feeds = settings.mixer, settings.feed_forward
        before, behind = settings.norms_at != "output", settings.norms_at != "input"

        def norm(there: bool, site: Site) -> RMSNorm | LayerNorm | None:
            return make_norm(settings.norm, width, eps, site.stack) if there else None

        self.mixer_norm = norm(mixes is not None and before, mixer_site)
        self.mixer_out_norm = norm(mixes is not None and behind, mixer_site)
        self.mixer: MixerModule | None = None if mixes is None else mixes.build(mixer_site, mixer)
        made = None if feeds is None else feeds.build(site, feed_forward)
        normed = feeds is not None and not feeds.own_norm()
        self.feed_forward_norm = norm(normed and before, site)
        self.feed_forward_out_norm = norm(normed and behind, site)
        self.feed_forward: FeedForwardModule | None = made
        self.dtype = dtype

    def __call__(
        self, x: jax.Array, where: Where, call: Call, state: State | None
    ) -> tuple[jax.Array, State, Tales, jax.Array | None]:
        """x [rows, n, width], the residual stream -> (the stream after the block, the mixer's state, what was done,
        logits of the feed-forward's router)."""
        told: Tales = {}
        logits = None
        if self.mixer is not None:
            normed = (x if self.mixer_norm is None else self.mixer_norm(x)).astype(self.dtype)
            if isinstance(state, Within) and not self.mixer.in_place:
                update, after, own = self.mixer(normed, where, call, state.own())
                state = state.replaced(after)
            else:
                update, state, own = self.mixer(normed, where, call, state)
            x = x + (update if self.mixer_out_norm is None else self.mixer_out_norm(update)).astype(x.dtype)
            told |= _named("mixer", own)
        if self.feed_forward is not None:
            h = x if self.feed_forward_norm is None else self.feed_forward_norm(x)
            update, own, logits = self.feed_forward.apply(h.astype(self.dtype), where, call)
            out_norm = self.feed_forward_out_norm
            x = x + (update if out_norm is None else out_norm(update)).astype(x.dtype)
            told |= _named("feed_forward", own)
        return constrain(x, "batch", "seq", None), state, told, logits

    @property
    def reads_previous(self) -> int:
        """Columns of the router logits of the layer below that its router reads; 0: it reads none."""
        routed = self.feed_forward
        return routed.choices if routed is not None and routed.reads_previous else 0


def _named(name: str, told: Told) -> Tales:
    return {name: told} if told else {}
