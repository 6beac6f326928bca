"""Next-token prediction with a teacher (Hinton et al., arXiv 1503.02531): what a trained model expects beside what the
text has."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.objectives import Inputs, Loss, next_token
from adaptive.objectives.cross_entropy import capped, chunk_length, chunks, joined
from adaptive.parallel.rules import batch_shards, constrain, device_kind, narrowed
from adaptive.routing.types import Output
from adaptive.settings import ranged

SMALLEST = 1e-6  # of a probability whose logarithm is taken


class Taught(NamedTuple):
    """What a teacher expects behind each position.

    tokens  i32[batch, seq, kept], the likeliest; nats f32[batch, seq, kept], their log-probabilities
    """

    tokens: jax.Array
    nats: jax.Array


@dataclasses.dataclass(frozen=True)
class Settings(next_token.Settings):
    """`share` of the divergence from the teacher, and the rest of the cross entropy.

    The divergence is Kullback and Leibler's, of the student from the teacher, over the teacher's `kept` likeliest
    tokens and, as one more, all others. Evaluation measures the cross entropy alone.

    teacher  folder of a run whose newest checkpoint teaches, with the same tokens
    """

    teacher: str = ""
    share: float = ranged(0.5, least=0.0, most=1.0)
    kept: int = ranged(32, least=1)

    def check(self, vocab: int) -> None:
        if not self.teacher:
            raise RecipeError("objective=distillation needs a teacher: objective.teacher=RUN, the folder of a run")
        if self.kept >= vocab:
            raise RecipeError(f"objective.kept={self.kept}: there are {vocab} tokens; at most {vocab - 1} can be kept")

    def inputs(self, batch: Any, key: jax.Array | None) -> Inputs:
        return super().inputs(batch, key)._replace(taught=batch.taught)

    def loss(self, model: Any, out: Output, inputs: Inputs, chunk: int) -> Loss:
        own = super().loss(model, out, inputs, chunk)
        if inputs.taught is None:
            return own
        rows, seq = inputs.tokens.shape
        weight = narrowed(model.head_weight(), out.hidden.dtype)
        chunk = chunk or chunk_length(seq, rows // batch_shards(), weight.shape[0], device_kind())
        off = divergence_sum(out.hidden, weight, inputs.taught, inputs.weights, chunk, model.settings.logit_soft_cap)
        total = (1 - self.share) * own.total + self.share * off
        return own._replace(total=total, apart={**own.apart, "teacher": off})


def divergence_sum(
    hidden: jax.Array, weight: jax.Array, taught: Taught, mask: jax.Array, chunk: int, cap: float = 0.0
) -> jax.Array:
    """f32[]: the sum over unmasked positions of the divergence from the teacher, in nats.

    hidden   [batch, seq, width]
    weight   [vocab, width] output matrix
    mask     f32[batch, seq] weight of each position in the sum
    chunk    positions of each sequence whose logits exist at once; divides seq. Their gradient computes them again
    """
    weight = constrain(weight, "vocab", None)

    @jax.checkpoint
    def body(total: jax.Array, args: Any) -> tuple[jax.Array, None]:
        h, tokens, nats, m = args
        logits = jnp.einsum("bsd,vd->bsv", h, weight, preferred_element_type=jnp.float32)
        logits = constrain(capped(logits, cap), "batch", "seq", "vocab")
        own = jnp.take_along_axis(logits, tokens, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return total + (divergence(nats, own) * m).sum(), None

    parts = chunks(hidden, taught.tokens, taught.nats, mask, chunk=chunk)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]


def divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """f32[...] in nats from the log-probabilities f32[..., kept] that both give to some tokens; the rest of each is one
    event more."""
    p, q = jnp.exp(teacher), jnp.exp(student)
    rest_p, rest_q = (jnp.clip(1 - a.sum(-1), SMALLEST, 1.0) for a in (p, q))
    return (p * (teacher - student)).sum(-1) + rest_p * (jnp.log(rest_p) - jnp.log(rest_q))


def expected(hidden: jax.Array, weight: jax.Array, kept: int, chunk: int, cap: float = 0.0) -> Taught:
    """What a model expects behind each position; arguments as of `divergence_sum`."""
    weight = constrain(weight, "vocab", None)

    def of(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("bsd,vd->bsv", part[0], weight, preferred_element_type=jnp.float32)
        nats, tokens = jax.lax.top_k(jax.nn.log_softmax(capped(logits, cap), axis=-1), kept)
        return tokens.astype(jnp.int32), nats

    return Taught(*map(joined, jax.lax.map(of, chunks(hidden, chunk=chunk))))
