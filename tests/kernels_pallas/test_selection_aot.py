"""Selection compiled for a TPU and an NVIDIA GPU, and the jax-triton kernel of the latter, interpreted too."""

import importlib.util
import json
import os
import subprocess
import sys

import aot
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.selection import top_positions, triton_gpu

pytestmark = pytest.mark.compiles

ROWS, SEQ, COUNT = 16, 2048, 682
INTERPRETED = """
import numpy as np, torch
from kernels_pallas.selection import triton_gpu
rng, kernel = np.random.default_rng(0), triton_gpu.body()
special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, -3.4e38, 1.0], np.float32)
for n, count in ((1, 1), (7, 3), (200, 66), (300, 300)):
    drawn = rng.normal(size=(2, n)).astype(np.float32)
    for scores in (drawn, drawn.round(1), rng.choice(special, size=drawn.shape)):
        out = torch.full((2, count), -1, dtype=torch.int32)
        kernel[(2,)](torch.from_numpy(scores), out, N=n, COUNT=count, BLOCK=max(256, 1 << (n - 1).bit_length()))
        ranked = np.where(np.isnan(scores), -np.inf, scores)
        want = np.sort(np.argsort(-ranked, -1, kind="stable")[:, :count], -1)
        assert (out.numpy() == want).all(), (n, count, scores, out, want)
"""


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_at_most_one_sort_and_nothing_moves_between_devices(target):
    facts = json.loads(aot.run(__file__, target).splitlines()[-1])
    assert facts["sorts"] == (0 if target == "h200" else 1)
    assert not facts["collectives"]
    if "triton" in facts:
        assert facts["triton"] == {"kernels": 1, "sorts": 0}


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "torch")), reason="needs triton and torch"
)
def test_the_body_of_the_kernel_interpreted():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=env, check=True, timeout=300)


def main(target):
    devices = aot.devices(target)
    mesh = Mesh(np.array(devices), ("data",))
    text = compiled(lambda scores: top_positions(scores, COUNT), mesh, 4 * ROWS)
    facts = {"sorts": text.count(" sort("), "collectives": hlo.collectives(text)}
    if target == "h200" and importlib.util.find_spec("jax_triton") is not None:
        alone = Mesh(np.array(devices[:1]), ("data",))
        text = compiled(lambda scores: triton_gpu.top_positions(scores, COUNT, capability=90), alone, ROWS)
        facts["triton"] = {"kernels": text.count(" custom-call("), "sorts": text.count(" sort(")}
    print(json.dumps(facts))


def compiled(f, mesh, rows):
    split = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(jax.ShapeDtypeStruct((rows, SEQ), jnp.float32, sharding=split)).compile().as_text()


if __name__ == "__main__":
    main(sys.argv[1])
