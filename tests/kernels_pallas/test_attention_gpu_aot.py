"""Attention compiled for an NVIDIA GPU, forward and backward, and attention over caches for a TPU and a GPU."""

import json
import math
import re
import sys
import tempfile
from pathlib import Path

import aot
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.attention import delta_of, gpu
from kernels_pallas.attention.decode import decode
from kernels_pallas.attention.seen import Seen

pytestmark = pytest.mark.compiles

# Rows, queries, keys, heads, heads of keys, head_dim, dtype; whether tags tell of documents.
CASES = {
    "mor_360m, chosen queries of all keys": (4, 1365, 2048, 15, 5, 64, "bfloat16", False),
    "hnet_1stage_l, chunks in documents": (4, 2458, 2458, 16, 16, 96, "bfloat16", True),
    "wide, in float32": (4, 300, 300, 2, 1, 200, "float32", True),
}
# Rows, queries, slots, heads, heads of keys, head_dim, dtype, options.
DECODE = {
    "mor_360m": (8, 1, 2048, 15, 5, 64, "bfloat16", {}),
    "hnet_1stage_l": (8, 1, 2458, 16, 16, 96, "bfloat16", {"window": 1024, "sinks": 4}),
    "few of many slots": (4, 3, 8192, 32, 8, 128, "float32", {"soft_cap": 30.0}),
}
COPY = re.compile(r"= \(?\w+\[([\d,]+)\]\S* (?:copy|transpose|copy-start|pad)\(")


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_compiles_to_its_own_kernels(target):
    facts = json.loads(aot.run(__file__, target).splitlines()[-1])
    for name in DECODE:
        fact = facts["decode"][name]
        assert fact["kernels"] == 1 and not fact["loops"] and not fact["collectives"], name
        rows, _, slots, _, kv_heads, dim, *_ = DECODE[name]
        assert fact["copied"] < rows // 4 * slots * kv_heads * dim, name  # the cache is read where it is
    for name, fact in facts.get("attention", {}).items():
        _, queries, keys, *_ = CASES[name]
        assert fact["kernels"] == 3, name  # forwards, d_q, d_kv
        assert fact["targets"] == ["sm_90a"], name  # shared memory of more than 227 KiB does not compile
        assert not fact["loops"] and not fact["collectives"], name
        # Nothing has an axis of queries beside one of keys, and the scores of one row and head would not fit.
        assert not {(queries, keys), (keys, queries)} & {tuple(pair) for pair in fact["sides"]}, name
        assert fact["temporaries"] < 4 * queries * keys, name
    if target == "h200":
        assert facts["attention"]["mor_360m, chosen queries of all keys"]["wgmma"]


def main(target):
    mesh = Mesh(np.array(aot.devices(target)), ("data",))
    facts = {"decode": {name: decoding(mesh, *case, aot.KERNEL[target]) for name, case in DECODE.items()}}
    if target == "h200":
        facts["attention"] = {name: attending(mesh, *case, aot.KERNEL[target]) for name, case in CASES.items()}
    print(json.dumps(facts))


def decoding(mesh, rows, queries, slots, heads, kv_heads, dim, dtype, options, kernel):
    cache = (rows, slots, kv_heads, dim), dtype
    kinds = ((rows, queries, heads, dim), dtype), cache, cache, ((rows,), jnp.int32), ((rows,), jnp.bool_)
    return compiled(mesh, lambda *a: decode(*a[:4], active=a[4], **options), kinds, kernel)


def attending(mesh, rows, queries, keys, heads, kv_heads, dim, dtype, documents, kernel):
    def program(q, k, v, d_out, *seen):
        seen = Seen(*seen[:2], None, *seen[2:])
        out, lse = gpu.forward(q, k, v, seen)
        return out, *gpu.backward(q, k, v, seen, delta_of(out, d_out), lse, d_out)

    q, k = ((rows, queries, heads, dim), dtype), ((rows, keys, kv_heads, dim), dtype)
    marks = [((rows, queries), jnp.int32)] * (3 if documents else 2) + [((rows, keys), jnp.int32)] * documents
    return compiled(mesh, program, (q, k, k, q, *marks), kernel)


def compiled(mesh, program, kinds, kernel):
    """Facts of a program with its rows over the devices."""
    split = PartitionSpec("data")
    structs = [jax.ShapeDtypeStruct(*kind, sharding=NamedSharding(mesh, split)) for kind in kinds]
    mapped = jax.shard_map(program, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    with tempfile.TemporaryDirectory() as dump, jax.set_mesh(mesh):
        done = jax.jit(mapped).lower(*structs).compile(compiler_options={"xla_dump_to": dump})
        machine = "".join(path.read_text() for path in Path(dump).glob("*.ptx"))
    text = done.as_text()
    return {
        "kernels": text.count(f'custom_call_target="{kernel}"'),
        "loops": text.count(" while("),
        "collectives": hlo.collectives(text),
        "copied": max((math.prod(map(int, shape.split(","))) for shape in COPY.findall(text)), default=0),
        "temporaries": done.memory_analysis().temp_size_in_bytes,
        "sides": sorted({tuple(map(int, pair)) for pair in re.findall(r"(?<=[\[,])(\d+),(\d+)(?=[\],])", text)}),
        "targets": sorted({*re.findall(r"\.target (\w+)", machine)}),
        "wgmma": machine.count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    main(sys.argv[1])
