"""Next-token cross entropy from hidden states, without ever holding all logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.parallel.rules import batch_shards, constrain, seq_shards
from adaptive.parallel.shard import sum_of_parts
from adaptive.peaks import memory_of
from adaptive.settings import divisors

NEVER = -1e6  # the logit of what is never predicted, as MDLM writes minus infinity


def chunk_length(seq: int, rows: int, vocab: int, kind: str) -> int:
    """Positions of each of `rows` sequences whose logits exist at once on a device of this kind; a divisor of `seq`.

    Every chunk reads the output matrix twice and its float32 gradient, which it writes again. That hides behind the
    matmuls from about 700 tokens on (1,600 on TPU v6e), so accelerators take at least 1,024 tokens, and more while
    their logits stay below 1/64 of the memory and half a GiB. CPUs are fastest with as many logits as their caches
    hold, and at least 128 tokens (docs/benchmarks.md).
    """
    if kind == "cpu":
        tokens = max(128, 2**21 // vocab)
    else:
        tokens = max(1024, min(2**29, (memory_of(kind) or 2**34) // 64) // (4 * vocab))
    return max(n for n in divisors(seq) if n <= max(1, tokens // max(1, rows)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_sum(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    chunk: int,
    cap: float = 0.0,
    never: int = -1,
) -> tuple[jax.Array, jax.Array]:
    """(sum over unmasked positions of the negative log-likelihood f32[], each position's f32[batch, seq]).

    hidden   [batch, seq, width]
    weight   [vocab, width] output matrix
    targets  i32[batch, seq]
    mask     f32[batch, seq] weight of each position in the sum
    chunk    positions of each part of a sequence whose logits exist at once; divides seq over the parts
    cap      logits are cap * tanh(logits / cap); 0: as they are
    never    a token that is never predicted, whatever its logit; -1: there is none

    The gradient is computed with the loss, chunk by chunk, so logits are neither kept nor computed twice: three matmuls
    of batch * seq * width * vocab in all. Only the sum is differentiable.
    """
    weight = constrain(weight, "vocab", None)
    nll = jax.lax.map(lambda part: _nll(part[0], part[1], weight, cap, never)[0], chunks(hidden, targets, chunk=chunk))
    nll = joined(nll)
    return (nll * mask).sum(), nll


class Predicted(NamedTuple):
    """Of each position [batch, seq]: nll f32, the target's negative log-likelihood in nats; top f32, the probability of
    the likeliest token; likeliest i32, that token, of several the first."""

    nll: jax.Array
    top: jax.Array
    likeliest: jax.Array


def predicted(
    hidden: jax.Array, weight: jax.Array, targets: jax.Array, chunk: int, cap: float = 0.0, never: int = -1
) -> Predicted:
    """What is predicted at each position; arguments as of `cross_entropy_sum`."""
    weight = constrain(weight, "vocab", None)

    def of(part: tuple[jax.Array, ...]) -> Predicted:
        nll, logits, log_z = _nll(part[0], part[1], weight, cap, never)
        return Predicted(nll, jnp.exp(logits.max(-1) - log_z), jnp.argmax(logits, axis=-1).astype(jnp.int32))

    return Predicted(*map(joined, jax.lax.map(of, chunks(hidden, targets, chunk=chunk))))


def _nll(
    hidden: jax.Array, targets: jax.Array, weight: jax.Array, cap: float, never: int = -1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(negative log-likelihood, logits, log of the normaliser) of each position, float32."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, weight, preferred_element_type=jnp.float32)
    logits = constrain(capped(logits, cap), "batch", "seq", "vocab")
    if never >= 0:
        logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == never, NEVER, logits)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - picked, logits, log_z


def capped(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap) (Gemma 2, section 2); cap 0: as they are."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def _forward(hidden, weight, targets, mask, chunk, cap, never):
    """Loss and gradients together. Each part of the batch and of sequences sums its own share of the weight's gradient
    over the chunks, so that the sum over devices happens once, after the loop."""
    parts = batch_shards() * seq_shards()
    weight = constrain(weight, "vocab", None)

    def body(d_weight, args):
        h, t, m = args
        nll, logits, log_z = _nll(h, t, weight, cap, never)
        p = jnp.exp(logits - log_z[..., None])
        p = p - (t[..., None] == jax.lax.broadcasted_iota(jnp.int32, p.shape, 2))
        p = p * (1 - jnp.square(logits / cap)) if cap else p
        d_logits = (p * m[..., None]).astype(h.dtype)
        d_hidden = jnp.einsum("bsv,vd->bsd", d_logits, weight)
        step = jnp.einsum("nsv,nsd->nvd", _parts(d_logits), _parts(h), preferred_element_type=jnp.float32)
        return constrain(d_weight + step, "tokens", "vocab", None), (nll, d_hidden)

    zero = constrain(jnp.zeros((parts, *weight.shape), jnp.float32), "tokens", "vocab", None)
    d_weight, (nll, d_hidden) = jax.lax.scan(body, zero, chunks(hidden, targets, mask, chunk=chunk))
    nll = joined(nll)
    return ((nll * mask).sum(), nll), (joined(d_hidden), sum_of_parts(d_weight, weight.dtype))


def _backward(chunk, cap, never, residuals, cotangents):
    d_hidden, d_weight = residuals
    g, _ = cotangents
    return (d_hidden * g.astype(d_hidden.dtype), d_weight * g.astype(d_weight.dtype), None, None)


cross_entropy_sum.defvjp(_forward, _backward)


def chunks(*arrays: jax.Array, chunk: int) -> tuple[jax.Array, ...]:
    """Each [batch, seq, ...] as [chunks, batch, parts * chunk, ...], a chunk of every part of the sequence at a time:
    what a device has stays with it."""
    parts = seq_shards()

    def cut(a: jax.Array) -> jax.Array:
        if parts == 1:
            return a.reshape(a.shape[0], -1, chunk, *a.shape[2:]).swapaxes(0, 1)
        own = jnp.moveaxis(a.reshape(a.shape[0], parts, -1, chunk, *a.shape[2:]), 2, 0)
        taken = own.reshape(*own.shape[:2], parts * chunk, *a.shape[2:])
        return constrain(taken, None, "batch", "seq", *(None,) * (a.ndim - 2))

    return tuple(map(cut, arrays))


def joined(a: jax.Array) -> jax.Array:
    """[chunks, batch, parts * chunk, ...] -> [batch, seq, ...]."""
    parts = seq_shards()
    if parts == 1:
        a = a.swapaxes(0, 1)
        return a.reshape(a.shape[0], -1, *a.shape[3:])
    own = jnp.moveaxis(a.reshape(*a.shape[:2], parts, -1, *a.shape[3:]), 0, 2)
    whole = own.reshape(own.shape[0], -1, *a.shape[3:])
    return constrain(whole, "batch", "seq", *(None,) * (whole.ndim - 2))


def _parts(a: jax.Array) -> jax.Array:
    """[batch, parts * chunk, ...] -> [parts of the batch * parts of the sequence, positions of each, ...]."""
    rows, columns = batch_shards(), seq_shards()
    if columns == 1:
        return a.reshape(rows, -1, a.shape[-1])
    own = a.reshape(rows, a.shape[0] // rows, columns, -1, a.shape[-1]).swapaxes(1, 2)
    return own.reshape(rows * columns, -1, a.shape[-1])
