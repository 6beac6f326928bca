"""How states keep keys and values: alike to whoever reads them, however they stand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx

from adaptive.layers import keys_values
from adaptive.layers.call import Call
from adaptive.layers.keys_values import ByHead, KeyValues, counts, empty, first, slots_of, taken, written
from adaptive.layers.site import Site
from adaptive.layers.stack import Making, Stack
from adaptive.layers.state import Within, repeated
from adaptive.layers.where import Where
from kernels_pallas.choice import target

ROWS, SLOTS, HEADS, DIM, LAYERS, WIDTH, SEQ = 2, 9, 3, 4, 2, 8, 13


def state_for(platform, slots=SLOTS):
    """Its shapes."""
    with target(platform):
        return jax.eval_shape(lambda: empty(ROWS, slots, HEADS, DIM, jnp.float32))


def test_states_of_cpus_have_the_slots_of_a_head_together():
    on_cpu, on_gpu = state_for("cpu"), state_for("gpu")
    assert type(on_cpu) is ByHead and on_cpu.k.shape == on_cpu.v.shape == (ROWS, HEADS, SLOTS, DIM)
    assert type(on_gpu) is KeyValues and on_gpu.k.shape == on_gpu.v.shape == (ROWS, SLOTS, HEADS, DIM)


def test_on_cpus_few_queries_read_a_power_of_two_of_the_slots():
    on_cpu = state_for("cpu", 600)
    assert (
        counts(on_cpu, 1)
        == counts(Within(jax.eval_shape(lambda a: repeated(a, LAYERS), on_cpu), 1), 1)
        == (128, 256, 512, 600)
    )
    assert counts(state_for("cpu", 128), 1) == (128,)
    assert counts(on_cpu, 100) == counts(state_for("gpu", 600), 1) == (600,)


@pytest.mark.compiles
@pytest.mark.parametrize("within", [False, True], ids=["alone", "in place"])
def test_what_is_written_is_read_however_it_stands(within):
    """Two positions of each row, of which one does not exist, over what stood there."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    k, v, slots = draw(ROWS, 2, HEADS, DIM), draw(ROWS, 2, HEADS, DIM), jnp.array([[1, 3], [4, 5]])
    where = Where(slots, slots, exists=jnp.array([[True, True], [True, False]]))
    old_k, old_v = draw(ROWS, SLOTS, HEADS, DIM), draw(ROWS, SLOTS, HEADS, DIM)

    @functools.partial(jax.jit, static_argnums=0)
    def run(platform):
        state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state_for(platform))
        as_kept = lambda a: a.swapaxes(1, 2) if isinstance(state, ByHead) else a  # noqa: E731
        state = state._replace(k=as_kept(old_k), v=as_kept(old_v), index=(state.index - 1).at[1, 5].set(5))
        given = Within(repeated(state, LAYERS), jnp.int32(1)) if within else state
        after = written(given, KeyValues(k, v, slots), where)
        alone = after.own() if within else after
        assert type(alone) is type(state)
        kept = [first(after, count) for count in (6, SLOTS)]
        return kept, taken(alone, slots), slots_of(after).exists, after.whole.k[0] if within else None

    (few, all_of), at, exists, other = run("cpu")
    jax.tree.map(np.testing.assert_array_equal, run("cpu")[:3], run("gpu")[:3])
    want = np.array(old_k)
    want[0, [1, 3]], want[1, 4] = k[0], k[1, 0]
    np.testing.assert_array_equal(all_of.k, want)
    np.testing.assert_array_equal(few.k, want[:, :6])
    np.testing.assert_array_equal(at.k[1], want[1, 4:6])
    np.testing.assert_array_equal(all_of.v[0, [1, 3]], v[0])
    np.testing.assert_array_equal(np.argwhere(exists), [[0, 1], [0, 3], [1, 4], [1, 5]])
    if within:
        np.testing.assert_array_equal(other, old_k.swapaxes(1, 2))


@pytest.mark.compiles
@pytest.mark.parametrize("window", [0, 5])
def test_positions_one_by_one_are_those_of_all_at_once(window, monkeypatch):
    """Through reads of 4, 8 and all slots; row 1 begins two positions later."""
    monkeypatch.setattr(keys_values, "FEWEST", 4)
    settings = shapes.hnet(("T2",), widths=(WIDTH,), heads=2, rotary_dim=4, window=window).body.stack
    make = lambda: Stack(settings, Site(WIDTH, 0.3), [jax.random.key(0)], Making(jnp.dtype("float32")))  # noqa: E731
    graphdef = nnx.split(nnx.eval_shape(make))[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, SEQ, WIDTH)), jnp.float32)
    call = Call(rule="causal", limited=False, counts=False)
    late = jnp.array([0, 2])

    @jax.jit
    def run():
        stack = nnx.merge(graphdef, nnx.state(make()))
        state = stack.empty(ROWS, SEQ)
        assert counts(jax.tree.map(lambda a: a[0], state[0]), 1) == (4, 8, SEQ)

        def step(carry, i):
            seen, state = carry
            where = Where.after(seen, 1, (i >= late)[:, None])
            own = jnp.take_along_axis(x, seen[:, None, None], 1)
            out, state, _, _ = stack(own, where, call, state)
            return (seen + where.counts(), state), out[:, 0]

        return stack(x, Where.whole((ROWS, SEQ)), call)[0], jax.lax.scan(step, (late * 0, state), jnp.arange(SEQ))[1]

    want, got = run()
    np.testing.assert_allclose(got[:, 0], want[0], atol=2e-6)
    np.testing.assert_allclose(got[2:, 1], want[1, : SEQ - 2], atol=2e-6)
