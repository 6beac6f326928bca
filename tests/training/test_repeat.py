"""A step that is computed twice: equal bits pass, one that differs is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.errors import CorruptionError
from adaptive.runs.state import TrainState
from adaptive.training.repeat import repeated

pytestmark = pytest.mark.compiles


def test_a_flipped_bit_is_found_and_the_array_is_named():
    mesh = Mesh(np.array(jax.devices()[:2]), ("all",))
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    fresh = lambda: TrainState(  # noqa: E731
        place(jnp.int32(4), P()), place(jnp.int32(0), P()), {"w": place(jnp.arange(8.0), P("all"))}, {}, {},
        place(jnp.zeros(2, jnp.uint32), P()),
    )  # fmt: skip
    calls = []

    @jax.jit
    def step(state, batch, wrong):
        moved = state.params["w"] * batch
        bits = jax.lax.bitcast_convert_type(moved, jnp.int32).at[5].add(wrong)
        params = {"w": jax.lax.bitcast_convert_type(bits, jnp.float32)}
        return state._replace(step=state.step + 1, params=params), {"loss": moved.sum()}

    def call(state, batch):
        calls.append(1)
        out = step(state, batch, jnp.int32(wrong and len(calls) % 2 == 0))
        state.params["w"].delete()  # as a step does that is given its state
        return out

    wrong = 0
    state, metrics = repeated(call, fresh(), jnp.float32(2))
    assert (
        int(state.step) == 5 and float(state.params["w"][3]) == 6 and float(metrics["loss"]) == 56 and len(calls) == 2
    )
    wrong = 1
    with pytest.raises(
        CorruptionError, match=r"step 5 was computed twice .* different numbers in state/params/w, on \S+\. "
    ):
        repeated(call, fresh(), jnp.float32(2))
    assert CorruptionError.code == 4
