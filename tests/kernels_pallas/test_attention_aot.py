"""Attention compiled for TPUs: the library's kernels forward and backward, and no array of queries times keys."""

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

from kernels_pallas.attention import attention

pytestmark = pytest.mark.compiles

HEADS, KV_HEADS, HEAD_DIM = 15, 5, 64  # mor_360m


@pytest.mark.parametrize("target", [name for name in aot.PACKAGES if name != "h200"])
def test_compiles_to_kernels_that_write_no_scores(target):
    for name, case in json.loads(aot.run(__file__, target).splitlines()[-1]).items():
        assert case["kernels"] in (2, 3), name  # forward, and backward in one or two
        assert not case["square"] and not case["collectives"], name


def main(target):
    devices = np.array(aot.devices(target))
    print(json.dumps({
        "row, over four": facts(Mesh(devices, ("data",)), 8, 2048, 2048, HEAD_DIM),
        "chosen queries, all keys": facts(Mesh(devices[:1], ("data",)), 2, 1365, 2048, HEAD_DIM, index=True),
        "documents": facts(Mesh(devices[:1], ("data",)), 2, 682, 682, 96, segments=True),
    }))  # fmt: skip


def facts(mesh, rows, queries, keys, head_dim, index=False, segments=False):
    """Of the program that computes the result and its gradients."""
    split = PartitionSpec("data")

    def program(q, k, v, d_out, index, q_segments, k_segments):
        given = {"q_index": index} if queries != keys else {}
        if segments:
            given |= {"q_segments": q_segments, "k_segments": k_segments}
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, **given), q, k, v)
        return out, *pull(d_out)

    wide, narrow = (rows, queries, HEADS, head_dim), (rows, keys, KV_HEADS, head_dim)
    kinds = [*((shape, jnp.bfloat16) for shape in (wide, narrow, narrow, wide)),
             *(((rows, n), jnp.int32) for n in (queries, queries, keys))]  # fmt: skip
    structs = [jax.ShapeDtypeStruct(*kind, sharding=NamedSharding(mesh, split)) for kind in kinds]
    mapped = jax.shard_map(program, mesh=mesh, in_specs=(split,) * 7, out_specs=split, check_vma=False)
    with jax.set_mesh(mesh):
        compiled = jax.jit(mapped).lower(*structs).compile()
    text = compiled.as_text()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "square": re.findall(rf"\w+\[[\d,]*\b{queries},{keys}\]", text)[:3],
        "collectives": hlo.collectives(text),
    }


if __name__ == "__main__":
    main(sys.argv[1])
