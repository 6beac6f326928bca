"""What every expert router is and returns."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.call import Call
from adaptive.layers.feed_forwards import FeedForwardModule
from adaptive.layers.linear import scored
from adaptive.layers.moe.settings import Execution, MoESettings
from adaptive.layers.site import Site, normal_param
from adaptive.layers.where import Where
from adaptive.routing.dispatch import Dispatch, count
from adaptive.routing.losses import averaged, of_calls
from adaptive.routing.replay import packed, unpacked
from adaptive.routing.types import Aux, AuxLosses, Summed, Told

STRAYED = "strayed"  # of the statistics: tokens whose experts are not those of the replay
MOST_COUNTED = 16  # experts per token are counted up to here; the last bin holds all above


class Noise(NamedTuple):
    """What training draws, given in place of the draws of a key; None: drawn.

    input   f32[batch, seq, width]    factors U(1 - jitter, 1 + jitter) of what the router reads
    logits  f32[batch, seq, choices]  N(0, 1) of token choice's `noise`; Gumbel of `acm`, and of `versatile` per loop
    choice  i32[batch, seq]           the random choice of `duo_llm`
    """

    input: jax.Array | None = None
    logits: jax.Array | None = None
    choice: jax.Array | None = None


class Context(NamedTuple):
    """What a routed layer may know besides its input.

    present    bool[batch, seq]  positions that hold a token; None: all
    previous   f32[batch, seq, choices]  logits of the router of the layer below; None at the first
    selection  "topk" as in training; "threshold" token by token, blind to the future, as in generation
    training   whether noise and warm-ups apply
    key        PRNG key of this layer's noise; None: none is drawn
    noise      draws in place of those of the key; read, as the key is, in training alone
    segments   i32[batch, seq]  documents, 0 is padding; None: one document per row
    replayed   bool[batch, seq, choices]  what is chosen, in place of what the router would (`Routing.chosen`); kept
               bool[batch, seq, experts], which of it is not dropped. None: the router decides
    limit      i32[batch]  average experts per token of each sequence, for expert choice; None: as the settings say
    mask_ratio  f32[batch]  share of each sequence's tokens that are hidden, which expert choice's schedule follows
    """

    present: jax.Array | None = None
    previous: jax.Array | None = None
    selection: Literal["topk", "threshold"] = "topk"
    training: bool = False
    key: jax.Array | None = None
    segments: jax.Array | None = None
    limit: jax.Array | None = None
    mask_ratio: jax.Array | None = None
    noise: Noise = Noise()
    replayed: jax.Array | None = None
    kept: jax.Array | None = None

    def among(self, scores: jax.Array, others: float = -1e30) -> jax.Array:
        """Scores f32[batch, seq, choices], those that a replay did not choose replaced by `others`."""
        return scores if self.replayed is None else jnp.where(self.replayed[..., : scores.shape[-1]], scores, others)

    def wanted(self, index: jax.Array, wanted: jax.Array) -> jax.Array:
        """bool[batch, seq, k]: of the choices i32 alike those that are wanted, or that a replay chose."""
        return wanted if self.replayed is None else jnp.take_along_axis(self.replayed, index, axis=-1)

    def drawn(self, given: jax.Array | None, draw: Callable[[jax.Array], jax.Array]) -> jax.Array | None:
        """The noise: what was given, else what `draw` makes of the key; None outside training and without either."""
        if not self.training:
            return None
        if given is not None:
            return jnp.asarray(given)
        return None if self.key is None else draw(self.key)


class Routing(NamedTuple):
    """One layer's decision.

    dispatch  who computes what
    losses    before coefficients; all that the router has, those of coefficient 0 among them
    stats     sums over tokens that add up over micro-batches and steps; see `statistics`
    parts     what `joint_losses` makes of all layers together
    logits    f32[batch, seq, choices], without N(0, 1) and Gumbel noise
    wanted    bool[batch, seq, choices]: what was chosen before anything was dropped, and behind it `further` choices;
              None: what is computed
    """

    dispatch: Dispatch
    losses: dict[str, Summed]
    stats: dict[str, jax.Array]
    parts: dict[str, jax.Array]
    logits: jax.Array
    wanted: jax.Array | None = None

    def chosen(self) -> jax.Array:
        """bool[batch, seq, n]: what was chosen for each token, and behind it which true experts compute it."""
        kept = self.dispatch.mask()
        wanted = (self.wanted,) if self.wanted is not None else (kept, self.dispatch.zero_weights != 0)
        return jnp.concatenate([*wanted, kept], axis=-1)


class RoutedLayer(FeedForwardModule):
    """A feed-forward in which tokens are routed.

    settings  of the whole layer
    site      where it stands
    further   how many choices there are besides experts
    """

    settings: MoESettings
    site: Site
    further: int = 0

    def routed(self, x: jax.Array, context: Context) -> tuple[jax.Array, Routing]:
        """x [batch, seq, width] -> (its update of the same shape, the router's whole decision)."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, context: Context | None = None) -> tuple[jax.Array, AuxLosses, Dispatch]:
        """x [batch, seq, width] -> (y of the same shape, auxiliary losses, who computed what)."""
        y, routing = self.routed(x, context or Context())
        coefficients = self.coefficients()
        losses = routing.losses | self.joint_losses(jax.tree.map(lambda a: a[None], routing.parts))
        aux = AuxLosses({name: Aux(loss, coefficients[name]) for name, loss in losses.items()})
        return y, aux, routing.dispatch

    def apply(self, x: jax.Array, where: Where, call: Call) -> tuple[jax.Array, Told, jax.Array]:
        replayed, kept = self._replayed(where, call)
        context = Context(
            present=where.present(),
            previous=call.previous,
            selection="topk" if call.rule == "train" else "threshold",
            training=call.training,
            key=call.key,
            segments=where.segments,
            limit=call.experts_per_token,
            mask_ratio=call.mask_ratio,
            replayed=replayed,
            kept=kept,
        )
        y, routing = self.routed(x, context)
        losses, made = self._trained(routing.losses), routing.dispatch
        per_token = {"experts": made.per_token()}
        if call.record or (call.counts and not call.training):
            per_token |= {"strongest": made.strongest()} | packed(routing.chosen())
        stats = routing.stats
        if context.kept is not None:
            stats = stats | {STRAYED: (made.mask() != context.kept).any(-1).sum().astype(jnp.float32)}
        return y, Told(losses, stats, routing.parts, per_token), routing.logits

    def _replayed(self, where: Where, call: Call) -> tuple[jax.Array | None, jax.Array | None]:
        """What a replay says of the layer's positions: what is chosen and what of it is kept, as in `Context`."""
        if call.replay is None or (words := call.replay.experts[0]) is None:
            return None, None
        own = jax.lax.dynamic_index_in_dim(words, call.layer, 0, keepdims=False)
        at = jax.vmap(lambda one: jnp.take_along_axis(one, where.index, axis=1))(own)
        choices = self.settings.choices + self.further
        mask = unpacked(at, choices + self.settings.experts)
        return mask[..., :choices], mask[..., choices:]

    def _trained(self, losses: dict[str, Summed]) -> dict[str, Summed]:
        """Those that a model trains, and what an adaptive coefficient is of: no others are computed there."""
        coefficients = self.coefficients()
        return {name: loss for name, loss in losses.items() if coefficients[name] or f"weighted_{name}" in losses}

    @classmethod
    def shape_of(cls, arrays: Mapping[str, jax.Array]) -> tuple[int, dict[str, Any]]:
        """(width, settings by name, the router's own among them) that explicit weights, by path, imply.

        Raises RecipeError where they imply none.
        """
        raise NotImplementedError

    def coefficients(self) -> dict[str, float]:
        """Coefficient of each loss."""
        return self.settings.router.coefficients()

    def joint_losses(self, parts: dict[str, jax.Array]) -> dict[str, Summed]:
        """Losses over all layers together, of their `Routing.parts` with a leading axis of calls."""
        return {}

    def losses(self, told: list[Told]) -> dict[str, tuple[Summed, float]]:
        """The mean of each loss over all calls, and the losses of all calls together."""
        if not told:
            return {}

        def flat(one: Told) -> tuple[dict[str, Summed], dict[str, jax.Array]]:
            lead = one.stats["calls"].ndim  # else a scalar
            return jax.tree.map(lambda a: a.reshape(-1, *a.shape[lead:]), (one.losses, one.parts))

        losses, parts = jax.tree.map(lambda *a: jnp.concatenate(a), *map(flat, told))
        each = {name: of_calls(loss) for name, loss in losses.items()} | self.joint_losses(parts)
        coefficients = self.coefficients()
        return {name: (loss, coefficients[name]) for name, loss in each.items()}

    def flops(self, tokens: float, width: int) -> tuple[float, float]:
        """Forward matmul FLOPs (of the router, of the experts) for a sequence of `tokens` tokens."""
        cost = self.settings.cost(tokens, self.site._replace(width=width))
        return cost.router, cost.feed_forward


class ExpertRouter(nnx.Module):
    """scores -> Dispatch. A subclass in a file of its own under routers/, named there `Router`, with its `Settings`.

    weight  f32[width, choices]: the router matrix; choices are the true experts, then the zero experts
    """

    reads_previous: bool = False
    input_scale: float = 1.0  # multiplies what the experts read

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        self.config, self.site = config, site
        self.options: Any = config.router
        self.choices, self.zero_experts = config.choices, config.router.zeros()
        self.weight = normal_param(key, (site.width, self.choices), (None, None), site.std, site.stack)

    def logits(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, width] -> f32[batch, seq, choices]."""
        return scored(x.astype(jnp.float32), self.weight[...])

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        raise NotImplementedError

    def zero_output(self, x: jax.Array, weights: jax.Array) -> jax.Array | None:
        """What zero experts add for x [batch, seq, width], given their weights f32[batch, seq, zero]; None: nothing."""
        return None

    def joint_losses(self, parts: dict[str, jax.Array]) -> dict[str, Summed]:
        """Losses over all layers together, of their `Routing.parts` with a leading axis of calls."""
        return {}

    def update(self, stats: dict[str, jax.Array]) -> None:
        """Moves the buffers by the sums of a whole step, each with the buffers' leading axes."""

    def execution(self, context: Context) -> Execution:
        """How the experts are computed. A router whose pairs are far fewer than its dispatch has room for overrides it:
        "auto" sees shapes alone."""
        return self.config.execution

    def selects_alike(self) -> bool:
        """Whether "topk" and "threshold" selection are the same."""
        return True

    def no_gradient(self) -> str:
        """Why the language-model loss cannot reach the router, with what would help; empty where it does."""
        return ""

    def refuse_generation(self) -> str:
        """Why this router cannot generate; empty where it can."""
        return ""


def poisoned(y: jax.Array, logits: jax.Array) -> jax.Array:
    """`y`, not a number where the router's logits are none: a broken router must not pass for one that drops tokens."""
    return jnp.where(jnp.isfinite(logits).all(-1, keepdims=True), y, jnp.nan)


def shape_in(arrays: Mapping[str, jax.Array], name: str, rank: int) -> tuple[int, ...]:
    """Shape of the explicit weight `name`; RecipeError unless it is there and has `rank` dimensions."""
    if name not in arrays or arrays[name].ndim != rank:
        raise RecipeError(f"explicit weights need {name} of {rank} dimensions")
    return arrays[name].shape


def statistics(
    dispatch: Dispatch,
    logits: jax.Array,
    claimed: jax.Array,
    present: jax.Array | None,
) -> dict[str, jax.Array]:
    """Sums over the tokens that are present, all float32.

    calls              f32[]         1: how often the layer ran
    tokens             f32[]
    claimed            f32[choices]  pairs that the router wanted, before any was dropped; zero experts included
    kept               f32[experts]  pairs that are computed
    experts_per_token  f32[17]       tokens by the number of true experts that compute them
    dropped            f32[]         pairs of true experts that were wanted and are not computed
    z, entropy, top    f32[]         logsumexp(logits)^2, entropy of the softmax, its largest probability
    """
    stop = jax.lax.stop_gradient
    logits = stop(logits)
    where = jnp.ones(logits.shape[:2], jnp.float32) if present is None else present.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    total = lambda a: (a * where).sum()  # noqa: E731
    per_token = dispatch.per_token()
    kept = dispatch.load()
    bins = jnp.where(where > 0, jnp.minimum(per_token, MOST_COUNTED), MOST_COUNTED + 1)
    return {
        "calls": jnp.ones((), jnp.float32),
        "tokens": where.sum(),
        "claimed": claimed,
        "kept": kept,
        "experts_per_token": count(bins, MOST_COUNTED + 1),
        "dropped": claimed[: dispatch.experts].sum() - kept.sum(),
        "z": total(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        "entropy": total(-(jnp.exp(log_p) * log_p).sum(-1)),
        "top": total(jnp.exp(log_p).max(-1)),
    }


def z_loss(logits: jax.Array, present: jax.Array | None) -> Summed:
    """mean_t logsumexp(l_t)^2."""
    return averaged(jnp.square(jax.nn.logsumexp(logits, axis=-1)), present)
