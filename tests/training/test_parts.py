"""What a part tells shows up in rows and in the report, without a change anywhere but in the part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
from flax import nnx
from train_steps import compiled_step, packed_batch
from training.example_run import recipe_of, write_example
from training.test_report import Page

from adaptive.data.tokenizers import ByteCounts
from adaptive.layers.call import Told
from adaptive.layers.mixers import Mixer, MixerModule
from adaptive.runs.state import abstract_model
from adaptive.training.log import MetricsLog
from adaptive.training.metrics import Meter, StepCost
from adaptive.training.parts import PartSums
from adaptive.training.report.page import write_report
from adaptive.training.step import make_eval_step

pytestmark = pytest.mark.compiles

ROWS, SEQ, LAYERS = 4, 16, 2


@dataclasses.dataclass(frozen=True)
class Settings(Mixer):
    """A mixer that does nothing and tells how many positions it saw."""

    def build(self, site, key):
        return Nothing()


class Nothing(MixerModule):
    def __call__(self, x, where, call, state):
        seen = jnp.full((), x.shape[0] * x.shape[1], jnp.float32)
        return jnp.zeros_like(x), state, Told(stats={"positions_seen": seen, "by_channel": jnp.ones(3)})


MODEL = shapes.plain(LAYERS, mixer=Settings(), vocab_size=32, width=16, hidden=24)
COLUMN = "told/stack/blocks/0/mixer/positions_seen"


def test_a_new_part_has_a_column_of_means_over_its_calls():
    program = compiled_step(MODEL, optax.sgd(0.1), (1, 1, 1, 1), ROWS, SEQ)
    _, metrics = program.run(program.state(), packed_batch(ROWS, SEQ, 32))
    assert metrics["told/stack/blocks/0/mixer:positions_seen"].shape == (LAYERS,)
    meter = Meter(StepCost(ROWS * SEQ, 1.0, 1.0, 1.0))
    for _ in range(3):
        meter.add(jax.device_get(metrics))
    row = meter.row(3)
    assert row[COLUMN] == ROWS * SEQ
    assert not [name for name in row if "by_channel" in name or name.startswith("keys")]


def test_calls_that_a_part_counts_itself_are_what_its_sums_are_divided_by():
    sums = PartSums()
    sums.add({"told/a/b:calls": np.array([2.0, 2.0]), "told/a/b:found": np.array([3.0, 5.0])})
    assert sums.columns() == {"told/a/b/found": 2.0}


def test_attention_tells_on_held_out_text_how_many_keys_a_query_reads():
    model = shapes.recursive(4, 2, vocab_size=32, width=16, hidden=24, heads=2, kv_heads=1, window=3)
    graphdef, _ = abstract_model(model.build)
    step = jax.jit(make_eval_step(graphdef, ByteCounts(jnp.ones(32, jnp.int32)), selection="topk", segmented=False))
    state = jax.jit(lambda key: nnx.state(model.build(key)))(jax.random.key(0))
    params, buffers = nnx.split_state(state, nnx.Param, ...)
    out = step(params, buffers, packed_batch(ROWS, SEQ, 32), jax.random.key(0))
    sums = PartSums()
    for _ in range(2):
        sums.add(jax.device_get(out.told))
    row = sums.columns()
    expected = np.mean([min(i + 1, 3) for i in range(SEQ)])
    names = {f"keys/{part}/blocks/0/mixer" for part in ("prelude", "core", "coda")}
    assert set(row) == names | {"keys_attended"}
    assert list(row.values()) == pytest.approx([expected] * 4)


def test_all_that_is_told_is_in_the_report(tmp_path):
    path = write_example(tmp_path / "run", "vanilla", steps=20)
    assert recipe_of("vanilla").model.facts().experts == ()
    assert "What the parts tell" not in Page(write_report(path).read_text()).titles
    log = MetricsLog.open(path, 20)
    for step in (30, 40):
        log.write({"step": step, "tokens": step * 100, COLUMN: 64.5 + step, "ce": 1.0})
        keys = {"eval/keys_attended": 8.0, "eval/keys/stack/blocks/0/mixer": 8.0}
        log.write({"step": step, "tokens": step * 100, "eval/loss": 1.0, f"eval/{COLUMN}": 63.25, **keys})
    log.close()
    page = Page(write_report(path).read_text())
    assert {"What the parts tell", "Positions seen", "Keys per query"} <= set(page.titles)
    cells = ("stack/blocks/0/mixer", "positions_seen", "104.5", "63.25")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page.text
