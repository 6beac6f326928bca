"""The digest of a state: the same number by numpy and by a compiled program, however arrays lie on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.runs import digest as digests
from adaptive.runs.digest import digest


def arrays():
    rng = np.random.default_rng(0)
    kinds = jnp.bool_, jnp.int8, jnp.uint32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32
    made = {np.dtype(kind).name: jax.device_put(rng.integers(0, 2, (3, 5)).astype(kind)) for kind in kinds}
    numbers = rng.normal(size=(8, 3)).astype(np.float32)
    return made | {
        "scalar": jax.device_put(np.float32(-0.0)),
        "empty": jax.device_put(np.zeros((0, 3), np.float32)),
        "sharded": jax.device_put(numbers, NamedSharding(Mesh(jax.devices(), "x"), P("x"))),
    }


def test_it_is_the_number_that_it_has_always_been():
    assert digest(arrays()) == "1176b684fda4e12d"


@pytest.mark.compiles
def test_numpy_and_a_program_find_the_same(monkeypatch):
    """In several pieces of numpy's, too, and from arrays of numpy."""
    monkeypatch.setattr(digests, "_AT_ONCE", 7)
    by_numpy = digest(arrays())
    monkeypatch.setattr(digests, "_sums_here", None)
    by_program = digest(jax.tree.map(np.asarray, arrays()))
    monkeypatch.setattr(digests, "FEW", 0)
    assert digest(arrays()) == by_program == by_numpy
