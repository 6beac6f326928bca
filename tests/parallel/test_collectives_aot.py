"""A train step that computes in bfloat16, compiled for TPUs and GPUs: what its collectives move."""

import json
import sys

import aot
import hlo
import jax
import pytest
import shapes

from adaptive.benchmarks.aot import ABORTS, EFFORT
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe
from adaptive.training.program import Program

pytestmark = pytest.mark.compiles

WIDTH, VOCAB = 256, 2048
MODEL = shapes.plain(2, width=WIDTH, heads=4, kv_heads=4, head_dim=64, hidden=512, vocab_size=VOCAB)
SETTINGS = ("mesh.fsdp=4", "mesh.data=1", "data.seq_len=256", "train.batch_size=4", "train.compute_dtype=bfloat16")


@pytest.mark.parametrize("target", aot.PACKAGES)
def test_parameters_are_gathered_in_bfloat16_and_the_heads_gradient_is_scattered(target):
    moved = json.loads(aot.run(__file__, target).splitlines()[-1])
    assert moved["all-gather bf16"] and "all-gather f32" not in moved
    assert moved["reduce-scatter f32"] and moved.get("all-reduce f32", 0) < WIDTH * VOCAB


def main(target):
    jax.config.update("jax_exec_time_optimization_effort", 0.0 if target in ABORTS else EFFORT)
    recipe = Recipe(name="made", model=MODEL).with_(*SETTINGS, "train.remat=layer")
    program = Program(recipe, make_mesh(recipe.mesh, aot.devices(target)))
    print(json.dumps(hlo.moved(program.compile_train_step().call.as_text())))


if __name__ == "__main__":
    main(sys.argv[1])
