"""A ring of attention compiled for a TPU and an NVIDIA GPU: own kernels, keys and values sent on and never gathered,
and something under way while each kernel of a step runs."""

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

from adaptive.parallel.context.axis import Context
from adaptive.parallel.context.dense import attention
from kernels_pallas.attention import Places

pytestmark = pytest.mark.compiles

PARTS, SEQ = 4, 4096


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_a_ring_hides_what_it_sends(target):
    case = json.loads(aot.run(__file__, target).splitlines()[-1])
    gpu = target == "h200"
    assert case["kernels"] == PARTS * (3 if gpu else 2)  # of gradients two, for queries and for keys, or one fused
    # Zig-zag of q, k, v and the result and of their gradients; keys and values twice around; their gradients home.
    sent = 2 * 2 * 4 + 2 * 2 * (PARTS - 1) + 2 * PARTS
    assert case["tensors sent"] == sent
    assert case["gathered"] == ["s32"]  # documents
    # All kernels but those of the last steps have neighbours' keys, or their gradients, coming meanwhile.
    assert case["alone"] <= (3 if gpu else 1)


def main(target):
    mesh, split = Mesh(np.array(aot.devices(target)), ("context",)), PartitionSpec(None, "context")

    def local(q, k, v, s):
        return attention(Context("context", PARTS), q, k, v, Places(None, None, s, s), schedule="ring")

    def program(q, k, v, g, s):
        run = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, s), q, k, v)
        return out, *pull(g)

    shapes = [((1, SEQ, heads, 64), jnp.bfloat16) for heads in (2, 1, 1, 2)] + [((1, SEQ), jnp.int32)]
    structs = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, split)) for shape in shapes]
    text = jax.jit(program).lower(*structs).compile().as_text()
    sent = re.findall(r" collective-permute(?:-start)?\(([^)]*)\)", text)
    print(json.dumps({
        "kernels": text.count(f'custom_call_target="{aot.KERNEL[target]}"'),
        "tensors sent": sum(len(operands.split(", %")) for operands in sent),
        "gathered": [key.split()[1] for key in hlo.moved(text) if key.startswith("all-gather")],
        "alone": alone(text, aot.KERNEL[target]),
    }))  # fmt: skip


def alone(text, kernel):
    """How many kernels run, in the order of the program, while nothing is on its way."""
    entry, under_way, found = text[text.index("\nENTRY") :], 0, 0
    for line in entry.splitlines():
        under_way += " collective-permute-start(" in line
        under_way -= " collective-permute-done(" in line
        found += kernel in line and not under_way
    return found


if __name__ == "__main__":
    main(sys.argv[1])
