"""The moving average compiled for a TPU and an NVIDIA GPU, forward and backward, on one device and on four."""

import json
import sys

import aot
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.ema import ema

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_compiles_to_its_own_kernels(target):
    facts = json.loads(aot.run(__file__, target).splitlines()[-1])
    for case in facts.values():
        assert case["kernels"] == 2  # one forwards, one backwards
        assert not case["loops"] and not case["collectives"]


def main(target):
    devices = np.array(aot.devices(target))
    four, one = Mesh(devices, ("data",)), Mesh(devices[:1], ("data",))
    print(json.dumps({
        "rows over four": facts(four, (16, 700, 1536), jnp.bfloat16, aot.KERNEL[target]),
        "odd": facts(one, (3, 1000, 40), jnp.float32, aot.KERNEL[target]),
        "short": facts(one, (2, 5, 960), jnp.bfloat16, aot.KERNEL[target]),
    }))  # fmt: skip


def facts(mesh, shape, dtype, kernel):
    """Of the program that computes the average and its gradients."""
    split = PartitionSpec("data")

    def program(z, p, starts, initial, d_out):
        out, pull = jax.vjp(lambda z, p, initial: ema(z, p, starts=starts, initial=initial), z, p, initial)
        return out, *pull(d_out)

    batch, n, width = shape
    kinds = [(shape, dtype), ((batch, n), jnp.float32), ((batch, n), jnp.bool_), ((batch, width), jnp.float32)]
    structs = [
        jax.ShapeDtypeStruct(*kind, sharding=NamedSharding(mesh, split)) for kind in (*kinds, (shape, jnp.float32))
    ]
    mapped = jax.shard_map(program, mesh=mesh, in_specs=(split,) * 5, out_specs=split)
    with jax.set_mesh(mesh):
        text = jax.jit(mapped).lower(*structs).compile().as_text()
    return {
        "kernels": text.count(f'custom_call_target="{kernel}"'),
        "loops": text.count(" while("),
        "collectives": hlo.collectives(text),
    }


if __name__ == "__main__":
    main(sys.argv[1])
