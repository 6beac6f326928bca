"""BlockFFN: a ReLU router with normalised weights over many small experts (arXiv 2507.08771)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context, ExpertRouter, Routing
from adaptive.layers.moe.settings import Bounded, Execution, MoESettings
from adaptive.layers.moe.varying import by_weight, how_computed
from adaptive.layers.site import Site, param
from adaptive.routing.chunks import chunks, neighbours
from adaptive.routing.losses import averaged
from adaptive.routing.types import Summed
from adaptive.settings import ranged

COUNTED = (8, 64)  # chunk lengths of the statistics
SMALL = 1e-5  # in the probabilities of the chunk sparsity loss, and in its logarithm
LEAST_RISE, MOST_RISE = 1.025, 4.0  # of the adaptive coefficient: in one window, and over its start in all


@dataclasses.dataclass(frozen=True)
class Settings(Bounded):
    """The paper's: the defaults, with locality_coefficient=1e-3 for 0.8B."""

    locality_coefficient: float = ranged(2e-3, least=0)
    sharpness: float = 100.0  # multiplies logits in the locality loss
    sparsity_coefficient: float = ranged(5e-2, least=0)  # at the start
    chunk: int = ranged(64, least=1)  # tokens, of the sparsity loss
    adapt: bool = True  # whether the sparsity coefficient follows its loss
    hold_steps: int = ranged(1000, least=0)  # before it does
    window: int = ranged(100, least=1)  # steps that losses are averaged over
    norm_eps: float = ranged(1e-5, above=0)

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if config.gated:
            raise RecipeError(
                f"{at}.gated=true: BlockFFN's experts have no gate, which would cost their sparsity; set "
                f"{at}.gated=false"
            )
        if self.hold_steps % self.window or self.hold_steps < 2 * self.window:
            raise RecipeError(
                f"{at}.router.hold_steps={self.hold_steps}: must be a multiple of {at}.router.window={self.window}, at "
                "least two"
            )

    def unread(self) -> dict[str, str]:
        return {} if self.adapt else dict.fromkeys(("hold_steps", "window"), "adapt=false")

    def against_starving(self, at: str) -> str:
        return f"lower {at}.router.sparsity_coefficient"

    def coefficients(self) -> dict[str, float]:
        return {
            "activation_locality_loss": self.locality_coefficient,
            "chunk_sparsity_loss": 0.0 if self.adapt else self.sparsity_coefficient,
            "weighted_chunk_sparsity_loss": 1.0,
        }

    def vectors(self, config: MoESettings, width: int) -> int:
        return config.experts


class Router(ExpertRouter):
    """a = relu(x weight); weights are a / rms(a) * gain; an expert is active where a > 0. No active expert: output 0.

    weight  f32[width, experts]
    gain    f32[experts], of the RMSNorm over experts; 1 at first
    coefficient, steps, window, before, origin, target  f32[]: buffers of the adaptive coefficient

    Experts have no gate (gated=false): down(silu(x up)). execution=dense is how the paper trains;
    execution=ragged with row_slack bounds the rows, a sequence's pairs of least weight being dropped and counted.
    experts_per_token is the average that bound and the account of compute expect.

    activation_locality_loss  BCE of z[t-1] against sigmoid(z[t]), z = sharpness x weight, mean over experts and
                              neighbours of one document; the gradient flows through the target too
    chunk_sparsity_loss       1 - mean over chunks and experts of prod_t (1 - p_te + 1e-5), p the weights without gain
                              over their sum + 1e-5: the soft share of experts that a chunk touches. A document is cut
                              into chunks from its start, and the last one padded with p = 0

    With adapt the latter is trained as weighted_chunk_sparsity_loss, its coefficient included: constant for
    hold_steps; then after every window of steps, ratio = mean loss of the window / that of the one before, if above 1
    at least 1.025; over the next window the coefficient moves linearly to min(4 start, coefficient * ratio), which the
    window's last step has. The loss is averaged over the layers of a stack, which share the coefficient.

    stats, besides the common: chunk_sparsity f32[] the loss's sum over calls; touched_8, chunks_8, touched_64,
    chunks_64, reused, reusable, of which `sparsity` makes the paper's metrics.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        super().__init__(config, site, key)
        o: Settings = self.options
        self.gain = param(jnp.ones((*site.stack, config.experts)), (None,), stack=site.stack, role="scale")
        start = lambda value: site.buffer(jnp.full((), value))  # noqa: E731
        self.coefficient = start(o.sparsity_coefficient)
        self.origin, self.target = start(o.sparsity_coefficient), start(o.sparsity_coefficient)
        self.steps, self.window, self.before = start(0.0), start(0.0), start(0.0)

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o = self.config, self.options
        logits = self.logits(x)
        normalised = rms_normalised(jax.nn.relu(logits), o.norm_eps)
        dispatch, _, stats = by_weight(c, logits, normalised * self.gain[...], logits > 0, o.row_slack, context)
        sparsity = self._sparsity_loss(normalised, context)
        losses = {"activation_locality_loss": self._locality_loss(logits, context), "chunk_sparsity_loss": sparsity}
        if o.adapt:
            weighted = {**sparsity.sums, "total": self.coefficient[...] * sparsity.sums["total"]}
            losses["weighted_chunk_sparsity_loss"] = Summed(weighted, sparsity.form)
        stats |= {"chunk_sparsity": jax.lax.stop_gradient(sparsity.value)} | shared_among_neighbours(
            logits > 0, context
        )
        return Routing(dispatch, losses, stats, {}, logits)

    def update(self, stats: dict[str, jax.Array]) -> None:
        o = self.options
        if not o.adapt:
            return
        steps = self.steps[...] + 1
        window = self.window[...] + stats["chunk_sparsity"].sum() / stats["calls"].sum()
        ends, place = steps % o.window == 0, steps % o.window
        mean = window / o.window
        ratio = mean / jnp.maximum(self.before[...], 1e-20)
        ratio = jnp.where(ratio > 1, jnp.maximum(ratio, LEAST_RISE), ratio)
        origin = jnp.where(ends, self.target[...], self.origin[...])
        aim = jnp.minimum(MOST_RISE * o.sparsity_coefficient, origin * ratio)
        target = jnp.where(ends & (steps >= o.hold_steps), aim, self.target[...])
        # Of the step that comes next: the first of a window takes the first part of the way, its last the whole.
        self.coefficient[...] = origin + (target - origin) * (place + 1) / o.window
        self.origin[...], self.target[...], self.steps[...] = origin, target, steps
        self.before[...] = jnp.where(ends, mean, self.before[...])
        self.window[...] = jnp.where(ends, 0.0, window)

    def execution(self, context: Context) -> Execution:
        return how_computed(self.config, self.options.row_slack, context)

    def selects_alike(self) -> bool:
        return not self.options.row_slack

    def _locality_loss(self, logits: jax.Array, context: Context) -> Summed:
        z = self.options.sharpness * logits
        bce = optax.sigmoid_binary_cross_entropy(z[:, :-1], jax.nn.sigmoid(z[:, 1:])).mean(-1)
        if not bce.size:
            return averaged(jnp.zeros(1, jnp.float32), None)
        return averaged(bce, neighbours(z.shape[:2], context.present, context.segments))

    def _sparsity_loss(self, normalised: jax.Array, context: Context) -> Summed:
        p = normalised / (normalised.sum(-1, keepdims=True) + SMALL)
        if context.present is not None:
            p = jnp.where(context.present[..., None], p, 0.0)
        own = chunks(p.shape[:2], self.options.chunk, context.present, context.segments)
        absent = own.length - own.sum(jnp.ones(p.shape[:2], jnp.float32))  # of the whole chunk, each with p = 0
        log_spared = own.sum(jnp.log(1 - p + SMALL)) + absent[..., None] * jnp.log(1 + SMALL)
        return averaged(1 - jnp.exp(log_spared).mean(-1), own.tokens > 0)


def rms_normalised(a: jax.Array, eps: float) -> jax.Array:
    """a over the root of the mean of its squares along the last axis; f32."""
    return a * jax.lax.rsqrt(jnp.square(a).mean(-1, keepdims=True) + eps)


def shared_among_neighbours(active: jax.Array, context: Context) -> dict[str, jax.Array]:
    """Sums f32[] of who is active bool[batch, seq, experts], for `sparsity`.

    touched_N, chunks_N  pairs of a chunk of N tokens and an expert that any of its tokens activates; chunks
    reused, reusable     active pairs whose expert the token before activates as well; those that have a token before
    """
    present, segments = context.present, context.segments
    active = active if present is None else active & present[..., None]
    counted = active.astype(jnp.float32)
    sums = {}
    for length in COUNTED:
        own = chunks(active.shape[:2], length, present, segments)
        sums[f"touched_{length}"] = (own.sum(counted) > 0).sum().astype(jnp.float32)
        sums[f"chunks_{length}"] = (own.tokens > 0).sum().astype(jnp.float32)
    later = counted[:, 1:] * neighbours(active.shape[:2], present, segments)[..., None]
    return sums | {"reused": (later * counted[:, :-1]).sum(), "reusable": later.sum()}


def sparsity(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The paper's metrics of summed statistics, over all leading axes: tls, cls_8, cls_64, the shares of experts that a
    token and a chunk of tokens do without; reuse, the share of active experts that the token before had as well."""
    experts = stats["claimed"].shape[-1]
    total = {name: stats[name].sum() for name in ("claimed", "tokens", "reused", "reusable")}
    missed = {
        f"cls_{n}": 1 - stats[f"touched_{n}"].sum() / jnp.maximum(stats[f"chunks_{n}"].sum() * experts, 1.0)
        for n in COUNTED
    }
    tls = 1 - total["claimed"] / jnp.maximum(total["tokens"] * experts, 1.0)
    return {"tls": tls, **missed, "reuse": total["reused"] / jnp.maximum(total["reusable"], 1.0)}
