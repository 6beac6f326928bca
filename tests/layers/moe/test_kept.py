"""What the backward pass of experts keeps: x, what goes into the activation, and indices; nothing of a row's width."""

import jax
import jax.numpy as jnp
import pytest

from adaptive.layers.moe.compute import computed
from adaptive.layers.moe.experts import FeedForward
from adaptive.routing.dispatch import by_expert, by_token

BATCH, SEQ, WIDTH, HIDDEN, EXPERTS, K = 2, 32, 24, 20, 4, 2
TOKENS = BATCH * SEQ


class Matrices:
    """Experts of given arrays."""

    activation = "silu"

    def __init__(self, arrays):
        self.arrays = arrays

    def weights(self, dtype):
        return self.arrays

    def axes(self):
        return dict.fromkeys(self.arrays, ("experts", None, None))


def expert_choice(scale):
    index = jnp.broadcast_to(jnp.arange(SEQ * K // EXPERTS, dtype=jnp.int32), scale.shape)
    return by_expert(index, scale, jnp.ones(scale.shape, bool), SEQ)


def token_choice(scale):
    return by_token(jnp.broadcast_to(jnp.arange(K), scale.shape), scale, jnp.ones(scale.shape, bool), EXPERTS)


CASES = {
    "expert choice": (expert_choice, (BATCH, EXPERTS, SEQ * K // EXPERTS), "capacity"),
    "token choice, dropless": (token_choice, (BATCH, SEQ, K), "ragged"),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_bytes(case, dtype):
    dispatch, pairs, execution = CASES[case]
    into, out = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)

    def pull(x, arrays, scale):
        layer = lambda x, arrays, scale: computed(Matrices(arrays), x, dispatch(scale), execution)[0]  # noqa: E731
        return jax.vjp(layer, x, arrays, scale)[1]

    shaped = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    arrays = {"gate": shaped(into, dtype), "up": shaped(into, dtype), "down": shaped(out, dtype)}
    kept = jax.tree.leaves(jax.eval_shape(pull, shaped((BATCH, SEQ, WIDTH), dtype), arrays, shaped(pairs, jnp.float32)))
    size = jnp.dtype(dtype).itemsize
    large = [a for a in kept if a.shape not in (into, out) and a.size > TOKENS * K]
    want = TOKENS * WIDTH * size + TOKENS * K * 2 * HIDDEN * size
    assert sum(a.size * size for a in large) == want
    assert {a.dtype for a in large} == {jnp.dtype(dtype)}
    # Beside these, indices, weights and masks: a few numbers for each pair.
    small = [a for a in kept if a.size <= TOKENS * K]
    assert sum(a.size * a.dtype.itemsize for a in small) <= 40 * TOKENS * K


@pytest.mark.compiles
@pytest.mark.parametrize("slots", [True, False])
def test_the_compiler_keeps_no_more(slots):
    """Memory between the passes, in a program whose backward pass starts after a barrier: only residuals cross it."""
    rows = (EXPERTS, TOKENS * K // EXPERTS) if slots else (TOKENS * K,)
    sizes = None if slots else jnp.full(EXPERTS, TOKENS * K // EXPERTS, jnp.int32)
    tokens = jnp.asarray(jnp.arange(TOKENS * K) % TOKENS, jnp.int32).reshape(rows)
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    arrays = {"gate": shaped(EXPERTS, WIDTH, HIDDEN), "up": shaped(EXPERTS, WIDTH, HIDDEN)}
    arrays["down"] = shaped(EXPERTS, HIDDEN, WIDTH)

    def forward(x, scale, arrays):
        run = lambda *a: FeedForward("silu").summed(a[2], a[0], tokens, a[1], None, sizes)  # noqa: E731
        return jax.vjp(run, x, scale, arrays)

    memory = jax.jit(forward).lower(shaped(TOKENS, WIDTH), shaped(*rows), arrays).compile().memory_analysis()
    weights = 3 * EXPERTS * WIDTH * HIDDEN
    result, x, pre, scale = TOKENS * WIDTH, TOKENS * WIDTH, 2 * TOKENS * K * HIDDEN, TOKENS * K
    assert memory.output_size_in_bytes <= 4 * (weights + result + x + pre + 2 * scale + EXPERTS) + 1024
