"""Grouped matmul compiled for a TPU and an NVIDIA GPU, forward and backward, on one device and on four."""

import json
import re
import sys

import aot
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu

pytestmark = pytest.mark.compiles

ROWS, GROUPS, WIDTH, HIDDEN = 2048, 16, 960, 512
KERNEL = {"v5e": "tpu_custom_call", "h200": "__gpu$xla.gpu.triton"}


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_compiles_to_its_own_kernels(target):
    facts = json.loads(aot.run(__file__, target).splitlines()[-1])
    assert facts["matmul"]["kernels"] >= 3
    assert facts["swiglu"]["kernels"] >= 9
    assert not facts["matmul"]["dense"] and not facts["swiglu"]["dense"]
    # Neither rows nor weights move; the weights' gradients, which all devices add to, are summed over them.
    assert set(facts["swiglu"]["collectives"]) == {"all-reduce"}
    # A dense product over all groups would need all of them times the rows.
    assert facts["swiglu"]["temporaries"] < GROUPS * ROWS * WIDTH * 2


def main(target):
    mesh = Mesh(np.array(aot.devices(target)), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()
    matrices = [(GROUPS, WIDTH, HIDDEN), (GROUPS, WIDTH, HIDDEN), (GROUPS, HIDDEN, WIDTH)]
    swiglu = jax.shard_map(
        lambda s, *a: grouped_swiglu(*a, s), mesh=mesh, in_specs=(split, split, whole, whole, whole), out_specs=split
    )
    wide = [(4 * ROWS, WIDTH), *matrices]
    specs = (split, split, split, whole, whole, whole)
    facts = {"swiglu": compiled(mesh, swiglu, jnp.bfloat16, 4 * GROUPS, wide[0], wide, specs, KERNEL[target])}
    single = Mesh(np.array(aot.devices(target))[:1], ("data",))
    odd = [(1000, 40), (3, 40, 72)]
    matmul = lambda s, *a: grouped_matmul(*a, s)  # noqa: E731
    facts["matmul"] = compiled(single, matmul, jnp.float32, 3, (1000, 72), odd, (whole,) * 4, KERNEL[target])
    print(json.dumps(facts))


def compiled(mesh, f, dtype, groups, out, shapes, specs, kernel):
    """Facts of the program that computes f(group_sizes, *arrays) and its gradients."""

    def program(d, sizes, *arrays):
        y, pull = jax.vjp(lambda *a: f(sizes, *a), *arrays)
        return y, *pull(d)

    kinds = [(out, dtype), ((groups,), jnp.int32), *((shape, dtype) for shape in shapes)]
    structs = [
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
        for (shape, kind), spec in zip(kinds, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(program).lower(*structs).compile()
    text = program.as_text()
    return {
        "kernels": text.count(f'custom_call_target="{kernel}"'),
        "dense": len(re.findall(r" (?:dot|convolution)\(|__cublas", text)),
        "collectives": hlo.collectives(text),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(sys.argv[1])
