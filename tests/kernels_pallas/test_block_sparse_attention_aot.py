"""Block-sparse attention compiled for a TPU and an NVIDIA GPU, forward and backward, on one device and on four."""

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

from kernels_pallas.block_sparse_attention import block_sparse_attention

pytestmark = pytest.mark.compiles

LONG = 8192
# Rows, queries, keys, heads, kv_heads, head_dim; query_block, key_block, slots; more, and the dtype.
USUAL = (1, LONG, LONG, 16, 4, 64, 128, 128, 16, (), "bfloat16")
CASES = {
    "usual": USUAL,
    # Everything that a tile may be asked, and sides that fit none.
    "choices": (2, 1000, 1100, 6, 2, 80, 64, 64, 40, ("bits", "index", "segments", "rule"), "bfloat16"),
    "float32, wide heads, large blocks": (2, 1024, 1024, 2, 2, 256, 512, 512, 2, (), "float32"),
    # A list for each query, whose rows are the heads of a group.
    "by query": (1, 256, 1024, 16, 1, 64, 1, 64, 4, (), "bfloat16"),
    "step": (4, 1, 1024, 4, 2, 64, 1, 128, 4, ("index",), "bfloat16"),
    # As many slots as scalar memory holds at once.
    "full": (1, 2**15, 2**13, 1, 1, 64, 16, 128, 48, (), "bfloat16"),
    # More slots than scalar memory holds at once: a loop over rows and key heads.
    "many": (3, 2048, 2048, 2, 1, 64, 16, 32, 384, (), "bfloat16"),
}
SOME = ("usual", "choices")  # what every run compiles
if not aot.ALL:
    CASES = {name: CASES[name] for name in SOME}


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_compiles_to_its_own_kernels(target):
    facts = json.loads(aot.run(__file__, target).splitlines()[-1])
    for name, of in facts.items():
        assert of["kernels"] == 3, name  # one forwards, two backwards
        assert not of["square"], name
        assert bool(of["calls in a loop"]) == (name == "many" and target != "h200"), name
        assert not of["collectives"], name
    # Temporaries are copies of arguments and results by heads, not scores: those of all slots would be 512 MiB.
    assert facts["usual"]["temporaries"] < 2**27


def main(target):
    devices = np.array(aot.devices(target))
    one, four = Mesh(devices[:1], ("data",)), Mesh(devices.reshape(2, 2), ("data", "tensor"))
    facts = {name: compiled(one, aot.KERNEL[target], *case) for name, case in CASES.items()}
    facts["sharded"] = compiled(four, aot.KERNEL[target], 2, *USUAL[1:])
    print(json.dumps(facts))


def compiled(mesh, kernel, rows, queries, keys, heads, kv_heads, dim, query_block, key_block, slots, more, dtype):
    """Facts of the program that computes it and its gradients; rows and heads over the mesh."""
    tensor = "tensor" if "tensor" in mesh.axis_names else None
    split, listed = PartitionSpec("data", None, tensor), PartitionSpec("data", tensor)
    count, words = -(-queries // query_block), -(-slots // 32)
    rule = {"window": 300, "sinks": 4, "soft_cap": 20.0} if "rule" in more else {}
    i32, table = jnp.int32, (rows, kv_heads, count, slots)
    arrays = {
        "q": ((rows, queries, heads, dim), dtype, split),
        "k": ((rows, keys, kv_heads, dim), dtype, split),
        "v": ((rows, keys, kv_heads, dim), dtype, split),
        "d_out": ((rows, queries, heads, dim), dtype, split),
        "d_lse": ((rows, heads, queries), jnp.float32, listed),
        "table": (table, i32, listed),
        "counts": (table[:3], i32, listed),
    }
    if "bits" in more:
        arrays["row_bits"] = ((*table[:3], query_block, words), jnp.uint32, listed)
    for kind in ("index", "segments"):
        if kind in more:
            for side, size in (("q", queries), ("k", keys)):
                arrays[f"{side}_{kind}"] = ((rows, size), i32, PartitionSpec("data"))

    def program(given):
        q, k, v, d_out, d_lse = (given.pop(name) for name in ("q", "k", "v", "d_out", "d_lse"))
        options = {"query_block": query_block, "key_block": key_block, "with_lse": True, **rule, **given}
        out, pull = jax.vjp(lambda q, k, v: block_sparse_attention(q, k, v, **options), q, k, v)
        return *out, *pull((d_out, d_lse))

    specs = {name: spec for name, (_, _, spec) in arrays.items()}
    results = (split, listed, split, split, split)
    mapped = jax.shard_map(program, mesh=mesh, in_specs=(specs,), out_specs=results)
    structs = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
        for name, (shape, kind, spec) in arrays.items()
    }
    with jax.set_mesh(mesh):
        program = jax.jit(mapped).lower(structs).compile()
    text = program.as_text()
    return {
        "kernels": text.count(f'custom_call_target="{kernel}"'),
        "square": queries > 1 and len(re.findall(rf"\[(?:\d+,)*{queries},{keys}(?:,\d+)*\]", text)),
        "calls in a loop": sum(kernel in body for body in bodies_of_loops(text)),
        "collectives": hlo.collectives(text),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


def bodies_of_loops(text):
    names = re.findall(r"while\(.*body=(%[\w.\-]+)", text)
    return [body for body in text.split("\n\n") if any(body.startswith(f"{name} ") for name in names)]


if __name__ == "__main__":
    main(sys.argv[1])
