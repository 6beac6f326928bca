"""Parameters are made of a checkpoint without a second copy of it: in a process of its own, by the system's count."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, math, sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from adaptive.interop import huggingface
from adaptive.interop.families import families
from adaptive.interop.files import lazy_tensors
from adaptive.interop.stored import write_tensors
from adaptive.interop.tensors import parts_of


def held(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024


def config(width, layers):
    return {"vocab_size": 16 * width, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": 8}


def written(folder, config):
    folder.mkdir()
    settings = huggingface.settings_of(families()["llama"], config)
    shapes = {name: (np.float32, part.shape) for name, part in parts_of(families()["llama"].layout(settings)).items()}
    write_tensors(folder / "model.safetensors", ((n, np.full(s, 0.01, d)) for n, (d, s) in shapes.items()), shapes)
    return sum(4 * math.prod(shape) for _, shape in shapes.values())


def state(folder, config):
    found = huggingface.read("llama", lazy_tensors(folder), config)
    shapes = nnx.state(nnx.eval_shape(lambda: found.settings.build(jax.random.key(0))))
    return found.state(shapes, lambda path, value: jax.device_put(value, jax.devices()[0]).block_until_ready())


folder = Path(sys.argv[1])
small, large = config(32, 2), config(256, 10)
written(folder / "small", small)
size = written(folder / "large", large)
state(folder / "small", small)  # imports and caches
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
before = held("VmRSS")
kept = state(folder / "large", large)
print(size, (held("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")
def test_the_host_holds_little_more_than_the_parameters(tmp_path):
    """On CPUs, where parameters are in the host's memory: the peak is they themselves and less than a half."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=True, timeout=120
    )
    size, share = map(float, done.stdout.split()[-2:])
    assert size > 5e7 and share < 1.45
