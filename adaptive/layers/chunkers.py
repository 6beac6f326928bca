"""What decides where a chunk begins: learned chunkers, and rules behind the same interface."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.layout import ChunkerKind
from adaptive.layers.linear import normal_param
from adaptive.routing.boundaries import Boundaries

FLOOR = 1e-12  # of the norms in the cosine: a zero vector has a similarity, and a finite gradient
BEGIN = 254  # begins a document in H-Net's bytes


class Heard(NamedTuple):
    """What a chunker may look at: every position and its past.

    hidden, before   [batch, n, width]  the encoder's output at each position and at the one before it
    first            bool[batch, n]     positions that begin a document
    number           i32[batch, n]      place in the document
    tokens, earlier  i32[batch, n]      the bytes and those before them; None but at the first stage
    given            bool[batch, n]     boundaries that came with the batch; None: none did
    key              PRNG key where training adds noise; None: no noise
    """

    hidden: jax.Array
    before: jax.Array
    first: jax.Array
    number: jax.Array
    tokens: jax.Array | None = None
    earlier: jax.Array | None = None
    given: jax.Array | None = None
    key: jax.Array | None = None


class Chunker(nnx.Module):
    """Decides every position from itself and its past, which keeps the model causal. A document's first begins a chunk.

    learned  whether it has parameters: its probabilities smooth the chunks, and a ratio loss steers them
    """

    learned = False

    def __call__(self, heard: Heard) -> Boundaries:
        """Of every position [batch, n]; a rule is certain, so its probabilities are 1 and 0."""
        wanted = heard.first | self.begins(heard)
        return Boundaries(wanted.astype(jnp.float32), wanted)

    def begins(self, heard: Heard) -> jax.Array:
        """bool[batch, n]: whether a chunk begins, for positions that are no document's first."""
        raise NotImplementedError


class Everywhere(Chunker):
    """No chunking: every position is a chunk of its own."""

    def begins(self, heard: Heard) -> jax.Array:
        return jnp.ones(heard.first.shape, bool)


class Stride(Chunker):
    """Every `length` positions of a document: H-Net (pool) of the H-Net paper, section 3.1."""

    def __init__(self, length: int):
        self.length = length

    def begins(self, heard: Heard) -> jax.Array:
        return heard.number % self.length == 0


class Space(Chunker):
    """A byte like a space after one that is not (SpaceByte paper, section 3; released code, spacebyte.py)."""

    def begins(self, heard: Heard) -> jax.Array:
        if heard.tokens is None or heard.earlier is None:
            raise RecipeError("model.hnet.chunkers=space reads bytes: it is for stage 0")
        return (space_like(heard.tokens) & ~space_like(heard.earlier)) | (heard.tokens == BEGIN)


def space_like(byte: jax.Array) -> jax.Array:
    """Whether bytes are neither ASCII letters or digits nor continue a UTF-8 character."""
    alphanumeric = jnp.zeros(byte.shape, bool)
    for low, high in ("09", "AZ", "az"):
        alphanumeric = alphanumeric | ((byte >= ord(low)) & (byte <= ord(high)))
    return ~alphanumeric & ((byte < 128) | (byte >= 192))


class Given(Chunker):
    """Where the batch says, as a splitter of words decided (HAT: `adaptive.data.words`)."""

    def begins(self, heard: Heard) -> jax.Array:
        if heard.given is None:
            raise RecipeError("model.hnet.chunkers=words needs boundaries with the batch: set data.boundaries=words")
        return heard.given


class Dynamic(Chunker):
    """p = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2, a chunk where p > 1/2 (H-Net paper, equation 4; modules/dc.py).

    Always float32: near one half bfloat16 has steps of 2^-9. W_q and W_k begin as the identity.
    """

    learned = True

    def __init__(self, width: int):
        self.q, self.k = (nnx.Param(jnp.eye(width), axes=(None, None)) for _ in range(2))

    def __call__(self, heard: Heard) -> Boundaries:
        prob = jnp.where(heard.first, 1.0, self.probability(heard))
        return Boundaries(prob, prob > 0.5)

    def probability(self, heard: Heard) -> jax.Array:
        """f32[batch, n], without regard to documents."""
        q, k = (_unit(x, w[...]) for x, w in ((heard.before, self.q), (heard.hidden, self.k)))
        return jnp.clip((1 - (q * k).sum(-1)) / 2, 0.0, 1.0)


class Similarity(Dynamic):
    """The same from random projections, a chunk where p >= 1/2; in training drawn at random from sharpened
    probabilities, without which p gathers at one half (ConceptMoE paper, sections on chunking and on noise)."""

    def __init__(self, width: int, temperature: float, std: float, key: jax.Array):
        """temperature: of the sharpening, tau; 0: no noise."""
        self.q, self.k = (normal_param(k, (width, width), (None, None), std) for k in jax.random.split(key))
        self.temperature = temperature

    def __call__(self, heard: Heard) -> Boundaries:
        prob = jnp.where(heard.first, 1.0, self.probability(heard))
        if heard.key is None or not self.temperature:
            return Boundaries(prob, prob >= 0.5)
        root = 1 / self.temperature
        sharp = jnp.where(prob >= 0.5, prob**root, 1 - (1 - prob) ** root)
        drawn = jax.random.uniform(heard.key, prob.shape) < jax.lax.stop_gradient(sharp)
        return Boundaries(prob, drawn | heard.first)


def make_chunker(
    kind: ChunkerKind, width: int, *, target: float, flip_temperature: float, std: float, key: jax.Array
) -> Chunker:
    """The chunker of a stage of this width; see HNetConfig."""
    match kind:
        case "dynamic":
            return Dynamic(width)
        case "similarity":
            return Similarity(width, flip_temperature, std, key)
        case "stride":
            return Stride(int(target))
        case "space":
            return Space()
        case "words":
            return Given()
        case "none":
            return Everywhere()


def _unit(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [batch, n, width] through `weight` [width, out], scaled to length one, in float32."""
    y = jnp.matmul(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    # The norm's square, not the norm, is bounded from below: at zero the root has no derivative.
    return y * jax.lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), FLOOR**2))
