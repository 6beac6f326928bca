"""Learners in order, of which a prefix computes: the first two phases of adaptive computation modules (ACM).

1. Distil: every module by itself, from the activations of the trained model it replaces: `learners_of` slices its
   feed-forward, `distillation_loss` compares every prefix with the original's output.
2. Gates: `gate_labels` says how many learners a token needs, `gate_loss` teaches the gate to say so.

The third phase trains the whole model with the losses of `adaptive.layers.moe.routers.acm`. Released settings: phase 1
with Adam at 1e-3 for 2 epochs, phase 2 at 1e-2 for 1, phase 3 at 1e-4.
"""

import jax
import jax.numpy as jnp
import optax

from adaptive.layers.moe.experts import ffn_slots
from adaptive.layers.moe.layer import MoE
from adaptive.routing.losses import mean_over


def learners_of(feed_forward: dict[str, jax.Array], learners: int) -> dict[str, jax.Array]:
    """Experts that add up to a feed-forward: adjacent slices of its hidden units.

    feed_forward  up and, if it has one, gate f32[width, hidden]; down f32[hidden, width]. `learners` divides hidden
    returns       the same names: [learners, width, hidden / learners], down [learners, hidden / learners, width]
    """
    size = feed_forward["up"].shape[1] // learners
    inward = lambda w: w.reshape(len(w), learners, size).swapaxes(0, 1)  # noqa: E731
    outward = lambda w: w.reshape(learners, size, -1)  # noqa: E731
    return {name: outward(w) if name == "down" else inward(w) for name, w in feed_forward.items()}


def prefix_outputs(layer: MoE, x: jax.Array, *, detach: bool = False) -> jax.Array:
    """b_0 + o_1 + ... + o_k for k = 0..N, f32[N + 1, batch, seq, width], of the layer's input x [batch, seq, width].

    detach  each prefix reaches its last learner alone, which then corrects what the earlier ones leave
    """
    weights = layer.experts.weights(x.dtype)
    rows = jnp.broadcast_to(x.reshape(-1, x.shape[-1]), (len(weights["up"]), x.size // x.shape[-1], x.shape[-1]))
    each = ffn_slots(weights, rows, layer.experts.activation).astype(jnp.float32).reshape(-1, *x.shape)
    prefixes = [jnp.broadcast_to(layer.router.base[...], x.shape)]
    for output in each:
        before = jax.lax.stop_gradient(prefixes[-1]) if detach else prefixes[-1]
        prefixes.append(before + output)
    return jnp.stack(prefixes)


def prefix_errors(prefixes: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared errors f32[N + 1, batch, seq] of prefixes [N + 1, batch, seq, width] against target [batch, seq,
    width], the original module's output."""
    return jnp.square(prefixes - jax.lax.stop_gradient(target)).mean(-1)


def distillation_loss(errors: jax.Array, present: jax.Array | None = None) -> jax.Array:
    """f32[]: the mean of `prefix_errors` over all prefixes and the tokens of present bool[batch, seq]."""
    return mean_over(errors.mean(0), present)


def gate_labels(errors: jax.Array, ratio: float = 1.2) -> jax.Array:
    """The learners i32[batch, seq] that each token needs, of `prefix_errors`: the fewest k for which one more helps
    little, error_k / error_{k+1} < ratio; all where every one helps."""
    enough = (errors[:-1] < ratio * errors[1:]) | (errors[:-1] == 0)
    return jnp.where(enough.any(0), jnp.argmax(enough, axis=0), len(errors) - 1).astype(jnp.int32)


def gate_loss(logits: jax.Array, labels: jax.Array, present: jax.Array | None = None) -> jax.Array:
    """Cross entropy f32[] of the router's logits f32[batch, seq, N + 1] and `gate_labels`."""
    return mean_over(optax.softmax_cross_entropy_with_integer_labels(logits, labels), present)
