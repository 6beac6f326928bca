"""A train step that computes in bfloat16, compiled for TPUs and GPUs: what its collectives move."""

import json
import math
import os
import re
import sys

import aot
import hlo
import jax
import pytest
import shapes
from meshes import COLLECTIVES, RECORD

from adaptive import targets
from adaptive.benchmarks import traffic
from adaptive.benchmarks.aot import ABORTS, EFFORT
from adaptive.benchmarks.compiled_text import Text
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe
from adaptive.training.program import Program

pytestmark = pytest.mark.compiles

WIDTH, VOCAB = 256, 512
MODEL = shapes.plain(2, width=WIDTH, heads=4, kv_heads=4, head_dim=64, hidden=512, vocab_size=VOCAB)
SETTINGS = ("data.seq_len=256", "train.batch_size=4", "train.compute_dtype=bfloat16")
# Recomputing layers sums what mixers give once more over the tensor axis: five sums for each layer in place of four.
MESHES = {
    "fsdp": ("mesh.data=1", "mesh.fsdp=4", "train.remat=layer"),
    "tensor": ("mesh.data=1", "mesh.tensor=4", "train.remat=none"),
}


@pytest.mark.parametrize("target", aot.PACKAGES if aot.ALL else ("v5e",))
def test_what_a_device_receives(target):
    """Parameters are gathered in bfloat16 and the head's gradient is scattered; in all a device receives little more
    than it must; and the collectives are those that were recorded."""
    found = json.loads(aot.run(__file__, target).splitlines()[-1])
    moved = found["fsdp"]["moved"]
    assert moved["all-gather bf16"] and "all-gather f32" not in moved
    assert moved["reduce-scatter f32"] and moved.get("all-reduce f32", 0) < WIDTH * VOCAB
    assert {mesh: about["ratio"] for mesh, about in found.items() if about["ratio"] > 1.15} == {}
    assert set(found["tensor"]["collectives"]) == {"all-reduce"}
    assert_recorded(target, {mesh: about["collectives"] for mesh, about in found.items()})


def test_between_slices_there_are_shares_of_gradients_alone():
    """Two slices of four TPUs: sums are scattered within each, and no more leaves it than their shares,
    a quarter of whole sums."""
    found = json.loads(aot.run(__file__, "v5e", "slices").splitlines()[-1])
    assert found["groups"] == ["{{0,1,2,3}}"]
    assert 0 < found["sent"] <= found["scattered"]


def assert_recorded(target, found):
    version, recorded = ".".join(jax.__version__.split(".")[:2]), json.loads(COLLECTIVES.read_text())
    if os.environ.get("ADAPTIVE_RECORD"):
        recorded.setdefault(version, {})[f"aot_{target}"] = found
        COLLECTIVES.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
    elif f"aot_{target}" in recorded.get(version, {}):
        message = f"if the change is meant, explain it in the commit and run:\n  {RECORD} or aot"
        assert found == recorded[version][f"aot_{target}"], message


def main(target, what="meshes"):
    if what == "slices":
        return print(json.dumps(between_slices(targets.Topology(target, 8, 2))))
    jax.config.update("jax_exec_time_optimization_effort", 0.0 if target in ABORTS else EFFORT)
    print(json.dumps({name: compiled(target, mesh) for name, mesh in MESHES.items()}))


def between_slices(topology):
    """Of a step: groups of the collectives within slices, bytes of what they scatter, and bytes that are sent on."""
    recipe = Recipe(name="made", model=MODEL).with_(*SETTINGS)
    recipe = recipe.with_("mesh.data=2", "mesh.fsdp=4", "mesh.slices=2", "train.batch_size=8")
    program = Program(recipe, make_mesh(recipe.mesh, targets.devices_of(topology)))
    text = program.compile_train_step().call.as_text()
    moved = hlo.moved(text)
    sent = re.findall(r"= \((\w+)\[([\d,]*)\].* send\(", text)
    return {
        "groups": sorted({*re.findall(r"replica_groups=(\{\{.*?\}\})", text)}),
        "scattered": sum(size for kind, size in moved.items() if kind.startswith("reduce-scatter")),
        "sent": sum(hlo.BYTES[kind] * math.prod(map(int, shape.split(","))) for kind, shape in sent),
    }


def compiled(target, mesh):
    """What the collectives of the program move; bytes that a device receives over the least that it must."""
    recipe = Recipe(name="made", model=MODEL).with_(*SETTINGS, *mesh)
    program = Program(recipe, make_mesh(recipe.mesh, aot.devices(target)))
    written = program.compile_train_step().call.as_text()
    text = Text(written)
    received = traffic.received(text.exchanges(), traffic.slices_of(program.mesh, 1)).values()
    least = sum(part.bytes for part in traffic.least(program))
    counts = {kind: {"runs": one.runs, "bytes": one.bytes} for kind, one in text.collectives().items()}
    ratio = sum(sum(one) for one in received) / least
    return {"moved": hlo.moved(written), "collectives": counts, "ratio": ratio}


if __name__ == "__main__":
    main(*sys.argv[1:])
