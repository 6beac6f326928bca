"""Machines that are not here, as XLA's compilers know them."""

import json
import os
import re
import sys

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from adaptive import targets

pytestmark = pytest.mark.compiles


@pytest.mark.skipif(os.environ.get("ADAPTIVE_AOT") != "all", reason="compiles for all targets: ADAPTIVE_AOT=all")
@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_compiler_knows_every_topology_and_as_much_memory(target):
    found, known = json.loads(aot.run(__file__, target).splitlines()[-1]), targets.TARGETS[target]
    assert found["devices"] == {str(count): [count, known.kind] for count in known.topologies}
    if target != "h200":  # whose compiler is told
        assert found["memory"] * 2**30 == known.memory


def main(target):
    sizes = targets.TARGETS[target].topologies
    devices = {count: targets.devices_of(targets.Topology(target, count)) for count in sizes}
    facts = {"devices": {count: [len(all_), all_[0].device_kind] for count, all_ in devices.items()}}
    if target != "h200":
        where = SingleDeviceSharding(devices[min(sizes)][0])
        try:
            jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**36,), jnp.float32, sharding=where)).compile()
        except jax.errors.JaxRuntimeError as error:
            facts["memory"] = float(re.search(r"available HBM \(([\d.]+)G\)", str(error))[1])
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
