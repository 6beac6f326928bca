"""The state space recurrence compiled for a TPU and an NVIDIA GPU, forward and backward, on one device and on four."""

import json
import sys

import aot
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.ssd import ssd

pytestmark = pytest.mark.compiles

KERNEL = {"v5e": "tpu_custom_call", "h200": "__gpu$xla.gpu.triton"}
HEADS, DIM, N = 32, 64, 128
WHOLE = (PartitionSpec(),) * 9
# Rows, positions, heads, head_dim, n and dtype; the last has sides that fit no tile.
CASES = {
    "usual": (4, 2048, HEADS, DIM, N, "bfloat16"),
    "float32": (4, 512, HEADS, DIM, N, "float32"),
    "odd": (4, 300, 6, 40, 24, "bfloat16"),
    "short": (4, 24, 8, DIM, N, "bfloat16"),
    "step": (4, 1, HEADS, DIM, N, "bfloat16"),
}


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_compiles_to_its_own_kernel(target):
    facts = json.loads(aot.run(__file__, target).splitlines()[-1])
    for name in CASES:
        assert facts[name]["kernels"] == (name != "step"), name
    # On four devices, rows over two and heads over two: all stay where they are. The cotangents of b and c, which all
    # heads read, are summed, and that of a, which all rows share.
    assert facts["sharded"]["kernels"] == 1
    assert set(facts["sharded"]["collectives"]) == {"all-reduce"}
    # The forward pass writes neither the states between blocks nor any matrix of a block.
    rows, seq, *_ = CASES["usual"]
    assert facts["usual"]["forward_temporaries"] < 4 * rows * seq * HEADS * DIM * 2


def main(target):
    devices = np.array(aot.devices(target))
    single = Mesh(devices[:1], ("data",))
    facts = {name: compiled(single, ssd, *case, KERNEL[target]) for name, case in CASES.items()}
    mesh = Mesh(devices.reshape(2, 2), ("data", "tensor"))
    split, heads, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("tensor"), PartitionSpec("data")
    carried = PartitionSpec("data", "tensor")

    def sharded(x, dt, a, b, c, *, segments, state):
        run = lambda x, dt, a, b, c, segments, state: ssd(x, dt, a, b, c, segments=segments, state=state)  # noqa: E731
        inputs = (split, split, heads, rows, rows, rows, carried)
        return jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=(split, carried))(
            x, dt, a, b, c, segments, state
        )

    specs = (split, split, heads, rows, rows, carried, split, carried, rows)
    facts["sharded"] = compiled(mesh, sharded, *CASES["usual"], KERNEL[target], specs)
    print(json.dumps(facts))


def compiled(mesh, f, batch, seq, heads, dim, n, dtype, kernel, specs=WHOLE):
    """Facts of the program that computes f and its gradients."""

    def program(x, dt, a, b, c, state, d_y, d_final, segments):
        run = lambda x, dt, a, b, c, state: f(x, dt, a, b, c, segments=segments, state=state)  # noqa: E731
        out, pull = jax.vjp(run, x, dt, a, b, c, state)
        return out, pull((d_y, d_final))

    def forward(x, dt, a, b, c, state, d_y, d_final, segments):
        return f(x, dt, a, b, c, segments=segments, state=state)

    x, dt, bc, state = (batch, seq, heads, dim), (batch, seq, heads), (batch, seq, n), (batch, heads, dim, n)
    f32 = jnp.float32
    kinds = [(x, dtype), (dt, f32), ((heads,), f32), (bc, dtype), (bc, dtype), (state, f32), (x, dtype), (state, f32)]
    kinds.append(((batch, seq), jnp.int32))
    structs = [
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
        for (shape, kind), spec in zip(kinds, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        both, alone = (jax.jit(p).lower(*structs).compile() for p in (program, forward))
    text = both.as_text()
    return {
        "kernels": text.count(f'custom_call_target="{kernel}"'),
        "collectives": hlo.collectives(text),
        "temporaries": both.memory_analysis().temp_size_in_bytes,
        "forward_temporaries": alone.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(sys.argv[1])
