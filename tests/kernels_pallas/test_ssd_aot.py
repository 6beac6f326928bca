"""The state space recurrence compiled for a TPU and an NVIDIA GPU, forward and backward, on one device and on four."""

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

from kernels_pallas.ssd import ssd

pytestmark = pytest.mark.compiles

HEADS, DIM, N = 32, 64, 128
WHOLE = (PartitionSpec(),) * 9
# Rows, positions, heads, head_dim, n and dtype: "usual" of hnet_1stage_l, 8 rows a device; "odd" has sides that fit no
# tile.
CASES = {
    "usual": (8, 8192, HEADS, DIM, N, "bfloat16"),
    "float32": (4, 512, HEADS, DIM, N, "float32"),
    "odd": (4, 300, 6, 40, 24, "bfloat16"),
    "short": (4, 24, 8, DIM, N, "bfloat16"),
    "step": (4, 1, HEADS, DIM, N, "bfloat16"),
}
if not aot.ALL:
    del CASES["float32"], CASES["short"]
FEW = ("float32", "odd", "sharded")  # heads and rows on a device


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_compiles_to_its_own_kernels(target):
    facts = json.loads(aot.run(__file__, target).splitlines()[-1])
    forward = facts.pop("forward")
    # Forward, states, backward. GPUs have the cotangents of states apart, and a pass over parts before each of three
    # where heads and rows are few.
    few, enough = (7, 4) if target == "h200" else (3, 3)
    for name, fact in facts.items():
        assert fact["kernels"] == (0 if name == "step" else few if name in FEW else enough), name
        assert not fact["loops"]
    # On four devices, rows over two and heads over two: all stay where they are. The cotangents of b and c, which all
    # heads read, are summed, and that of a, which all rows share.
    assert set(facts["sharded"]["collectives"]) == {"all-reduce"}
    # No matrix of a block is written; forward no state either, backward one for each 128 positions.
    assert not facts["usual"]["matrices"]
    rows, seq, *_ = CASES["usual"]
    x = rows * seq * HEADS * DIM * 2
    once, both = (2, 3) if target == "h200" else (0.1, 0.5)  # in units of x, which TPUs lay out anew nowhere
    assert forward["kernels"] == 1 and forward["temporaries"] < once * x
    assert facts["usual"]["temporaries"] < both * x


def main(target):
    devices = np.array(aot.devices(target))
    single = Mesh(devices[:1], ("data",))
    facts = {name: compiled(single, ssd, *case) for name, case in CASES.items()}
    facts["forward"] = compiled(single, ssd, *CASES["usual"], backward=False)
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
    facts["sharded"] = compiled(mesh, sharded, *CASES["usual"], specs)
    print(json.dumps(facts))


def compiled(mesh, f, batch, seq, heads, dim, n, dtype, specs=WHOLE, backward=True):
    """Facts of the program that computes f, and its gradients."""

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
        done = jax.jit(program if backward else forward).lower(*structs).compile()
    text = done.as_text()
    return {
        "kernels": len(re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla.gpu.triton)"', text)),
        "loops": text.count(" while("),
        "matrices": re.findall(r"\w+\[[\d,]*\b(?:64,64|128,128|256,256)\]", text),
        "collectives": hlo.collectives(text),
        "temporaries": done.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(sys.argv[1])
