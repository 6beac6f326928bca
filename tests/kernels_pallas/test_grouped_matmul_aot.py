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

from kernels_pallas.grouped_matmul import grouped_matmul, routed_swiglu

pytestmark = pytest.mark.compiles

TOKENS, K, GROUPS, WIDTH, HIDDEN = 8192, 2, 8, 960, 2560  # a mixture of eight experts, on each device


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_compiles_to_its_own_kernels(target):
    facts = json.loads(aot.run(__file__, target).splitlines()[-1])
    assert facts["matmul"]["kernels"] >= 3
    assert facts["swiglu"]["kernels"] >= 9
    assert not facts["matmul"]["dense"] and not facts["swiglu"]["dense"]
    # Neither rows nor weights move; the weights' gradients, which all devices add to, are summed over them.
    assert set(facts["swiglu"]["collectives"]) == {"all-reduce"}
    # A dense product over all groups would need all of them times the rows.
    assert facts["swiglu"]["temporaries"] < GROUPS * TOKENS * K * HIDDEN * 2


def main(target):
    mesh = Mesh(np.array(aot.devices(target)), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()
    matrices = [(GROUPS, WIDTH, HIDDEN), (GROUPS, WIDTH, HIDDEN), (GROUPS, HIDDEN, WIDTH)]
    swiglu = jax.shard_map(
        lambda s, tokens, x, scale, *a: routed_swiglu(x, tokens, scale, *a, s),
        mesh=mesh, in_specs=(split,) * 4 + (whole,) * 3, out_specs=split,
    )  # fmt: skip
    everywhere = lambda s, x, scale, *a: swiglu(s, jnp.tile(jnp.arange(4 * TOKENS) % TOKENS, K), x, scale, *a)  # noqa: E731
    tokens, pairs = (4 * TOKENS, WIDTH), (4 * TOKENS * K,)
    specs = (split, split, split, split, whole, whole, whole)
    out = jax.ShapeDtypeStruct(tokens, jnp.float32)
    arrays = [jax.ShapeDtypeStruct(tokens, jnp.bfloat16), jax.ShapeDtypeStruct(pairs, jnp.float32)]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in matrices]
    facts = {"swiglu": compiled(mesh, everywhere, 4 * GROUPS, out, arrays, specs, aot.KERNEL[target])}
    single = Mesh(np.array(aot.devices(target))[:1], ("data",))
    odd = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1000, 72), (1000, 40), (3, 40, 72))]
    matmul = lambda s, *a: grouped_matmul(*a, s)  # noqa: E731
    facts["matmul"] = compiled(single, matmul, 3, odd[0], odd[1:], (whole,) * 4, aot.KERNEL[target])
    print(json.dumps(facts))


def compiled(mesh, f, groups, out, arrays, specs, kernel):
    """Facts of the program that computes f(group_sizes, *arrays) and its gradients."""

    def program(d, sizes, *arrays):
        y, pull = jax.vjp(lambda *a: f(sizes, *a), *arrays)
        return y, *pull(d)

    structs = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip([out, jax.ShapeDtypeStruct((groups,), jnp.int32), *arrays], specs, strict=True)
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
