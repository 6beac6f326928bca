"""What is saved comes back whole, on any mesh, or not at all; a save that fails costs nothing but itself."""

import contextlib
import functools
import json
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes

from adaptive.errors import CheckpointError
from adaptive.models.depth import token_choice
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import AxisRules
from adaptive.runs import checkpoint
from adaptive.runs.checkpoint import FORMAT_VERSION, Checkpoints, read_part, steps_in
from adaptive.runs.config import CheckpointConfig
from adaptive.runs.digest import checksum, digest
from adaptive.runs.state import TrainState, initial_state, state_shardings

pytestmark = pytest.mark.compiles

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint_1"
LOSS_FREE = token_choice.Settings(balancing="loss_free")
MODEL = shapes.mor(4, 2, LOSS_FREE, vocab_size=32, width=16, hidden=16, heads=2)
TX = optax.adamw(1e-3)


@functools.cache
def drawn(seed: int) -> TrainState:
    """On the host: a program for each mesh would take longer than the tests."""
    return jax.tree.map(np.asarray, jax.jit(lambda key: initial_state(MODEL.build, TX, key))(jax.random.key(seed)))


def state_on(mesh: MeshConfig, devices=None, seed: int = 0) -> TrainState:
    where = state_shardings(MODEL.build, TX, make_mesh(mesh, devices), AxisRules())
    return jax.tree.map(lambda a, to: jax.make_array_from_callback(a.shape, to, lambda at: a[at]), drawn(seed), where)


def small(value: float = 0.0) -> TrainState:
    """A state of few arrays, for tests that save often."""
    params = {"table": jnp.arange(4096.0).reshape(64, 64) + value, "scale": jnp.full(3, value, jnp.bfloat16)}
    opt = optax.sgd(0.1, momentum=0.9).init(params)
    return TrainState(
        jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, {}, opt, jax.random.key_data(jax.random.key(3))
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def equal(a, b) -> bool:
    same = lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))  # noqa: E731
    return jax.tree.all(jax.tree.map(same, a, b))


@contextlib.contextmanager
def open_checkpoints(folder: Path, said: list[str] | None = None, **config):
    lines = [] if said is None else said
    checkpoints = Checkpoints(folder, CheckpointConfig(**config), {"name": "r", "seed": 0}, say=lines.append)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save_all(folder: Path, *steps: int, **config) -> None:
    with open_checkpoints(folder, **config) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"index": 8 * step})


@contextlib.contextmanager
def full_disk():
    """Files cannot grow beyond 2,000 bytes: the system refuses to write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def edit_about(folder: Path, *, signed: bool = True, **changes) -> None:
    """Changes what stands beside the arrays; signed: as if it had been saved so."""
    path = folder / "about" / "metadata"
    about = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**about, "checksum": checksum(about)} if signed else about))


# Round trips


def test_everything_comes_back_on_any_mesh(tmp_path):
    saved = state_on(MeshConfig(data=1, fsdp=4, tensor=2))
    saved = saved._replace(step=saved.step + 20, skipped=saved.skipped + 1)
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(saved) is None
        checkpoints.save(20, saved, {"index": 160, "sources": ["a"]})
    for mesh, devices in (
        (MeshConfig(data=8), None),
        (MeshConfig(data=2, fsdp=2, tensor=2), None),
        (MeshConfig(data=1), jax.devices()[:1]),
        (MeshConfig(data=1, fsdp=4, tensor=2), None),
    ):
        fresh = state_on(mesh, devices, seed=1)
        assert not equal(fresh.params, saved.params)
        with open_checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(abstract(fresh))
        assert equal(restored.state, saved)
        assert restored.step == 20 and restored.data_state == {"index": 160, "sources": ["a"]}
        assert restored.recipe == {"name": "r", "seed": 0}
        assert restored.digest == digest(saved) == digest(restored.state)
        placed = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), restored.state, fresh)
        assert jax.tree.all(placed)


def test_what_is_on_disk_is_plain(tmp_path):
    state = state_on(MeshConfig(data=8))
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {"index": 1})
    about = json.loads((tmp_path / "5" / "about" / "metadata").read_text())
    assert about["format_version"] == FORMAT_VERSION == 1
    assert (about["step"], about["data_state"], about["key_implementation"]) == (5, {"index": 1}, "threefry2x32")
    assert set(about["program"]) == {"adaptive", "jax"}
    arrays = about["arrays"]
    assert arrays["params/embedding"] == ["float32", [32, 16]]
    assert arrays["opt/0/mu/body/core/blocks/0/mixer/q"] == ["float32", [1, 16, 2, 8]]
    assert arrays["buffers/body/depth/bias"] == ["float32", [2]]
    assert arrays["key"] == ["uint32", [2]] and arrays["step"] == ["int32", []]
    assert len(arrays) == len(jax.tree.leaves(state))
    assert re.fullmatch(r"[\w/]+", "".join(arrays))  # no framework's punctuation
    assert not any(word in arrays for word in ("value", "raw_value"))


def test_training_may_go_on_in_the_saved_arrays_at_once(tmp_path):
    """The next step takes the state's memory (donation) while the save still writes."""
    state = small(1.0)
    before, kept = digest(state), jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + jnp.ones((), a.dtype), s), donate_argnums=0)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(20):
            state = step(state)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state))
    assert restored.digest == before and equal(restored.state, kept)


def test_the_checkpoint_of_every_released_format_loads():
    """`fixtures/checkpoint_N` was written by the first version that had format N; it is never rewritten."""
    with open_checkpoints(FIXTURE) as checkpoints:
        restored = checkpoints.restore(abstract(small()))
    assert equal(restored.state, small(2.0)) and restored.data_state == {"index": 16}


def test_a_fresh_run_does_not_wait_for_orbax(tmp_path):
    program = f"""
import sys
from adaptive.runs.checkpoint import Checkpoints
from adaptive.runs.config import CheckpointConfig
assert Checkpoints({str(tmp_path / "none")!r}, CheckpointConfig(), {{}}).restore(None) is None
assert not any(name.startswith("orbax") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# Which are kept


def test_the_last_ones_and_every_nth_are_kept(tmp_path):
    save_all(tmp_path, *range(1, 10), keep_last=2, keep_every=3)
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3, 6, 8, 9]
        assert equal(checkpoints.restore(small()).state, small(9))


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    save_all(tmp_path, 4)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, small(99.0), {})
        assert checkpoints.restore(small()).data_state == {"index": 32}


# Damage


def test_whatever_byte_is_wrong_nothing_wrong_comes_back(tmp_path):
    """Every file of the newest checkpoint in turn is emptied, cut short, altered and removed."""
    save_all(tmp_path / "whole", 1, 2)
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "2").rglob("*") if p.is_file())
    passed_over = 0
    for file in files:
        content = (tmp_path / "whole" / file).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :] if content else b"x"
        for damaged in (b"", content[:middle], flipped, None):
            folder = tmp_path / "damaged"
            shutil.copytree(tmp_path / "whole", folder)
            (folder / file).unlink() if damaged is None else (folder / file).write_bytes(damaged)
            said: list[str] = []
            with open_checkpoints(folder, said) as checkpoints:
                restored = checkpoints.restore(small())
            assert equal(restored.state, small(restored.step)), (file, damaged)
            assert restored.data_state == {"index": 8 * restored.step}
            if restored.step == 1:
                passed_over += 1
                (line,) = said
                assert line.startswith("warning: checkpoint 2 cannot be read (") and "going on from step 1" in line
            shutil.rmtree(folder)
    assert passed_over > len(files)  # the test does damage


@pytest.mark.parametrize(
    "change",
    [
        {"data_state": {"index": 17}},
        {"step": 3},
        {"recipe": {"name": "r", "seed": 1}},
        {"digest": "0" * 16},
        {"new": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_stands_beside_the_arrays_is_believed_only_as_it_was_saved(tmp_path, change):
    save_all(tmp_path, 1, 2)
    edit_about(tmp_path / "2", signed=False, **change)
    said: list[str] = []
    with open_checkpoints(tmp_path, said) as checkpoints:
        assert checkpoints.restore(small()).step == 1
    assert "checkpoint 2 cannot be read (what is said beside its arrays" in said[0] and "was changed" in said[0]
    with pytest.raises(CheckpointError, match="was changed"):
        read_part(tmp_path, 2, {"params": small().params})


def test_a_checkpoint_without_its_checksum_was_changed(tmp_path):
    save_all(tmp_path, 1)
    path = tmp_path / "1" / "about" / "metadata"
    about = json.loads(path.read_text())
    del about["checksum"]
    path.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="was changed"):
        read_part(tmp_path, 1, {"params": small().params})


def test_a_checkpoint_is_of_the_step_that_its_folder_says(tmp_path):
    save_all(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "9")
    said: list[str] = []
    with open_checkpoints(tmp_path, said) as checkpoints:
        assert checkpoints.steps() == [1, 9]
        assert checkpoints.restore(small()).step == 1
    assert "checkpoint 9 cannot be read (it is the checkpoint of step 2, not of 9 as its folder is called)" in said[0]
    with pytest.raises(CheckpointError, match="of step 2, not of 9"):
        read_part(tmp_path, 9, {"params": small().params})
    (tmp_path / "1").rename(tmp_path / "01")
    assert steps_in(tmp_path) == [9]


def test_a_step_that_was_damaged_can_be_saved_again(tmp_path):
    save_all(tmp_path, 1, 2, 3)
    (tmp_path / "3" / "about" / "metadata").write_text("")
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(small()).step == 2
        assert checkpoints.steps() == [2, 3]  # reading changed nothing
        checkpoints.save(3, small(3), {"index": 24})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3] and (tmp_path / "3.unreadable").is_dir()
        assert checkpoints.restore(small()).step == 3


def test_nothing_readable_is_an_error(tmp_path):
    save_all(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / "about" / "metadata").write_text("{")
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"no checkpoint in .* can be"):
        checkpoints.restore(small())


def test_an_unfinished_checkpoint_is_never_taken_for_one(tmp_path):
    save_all(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(small()).step == 1
        checkpoints.save(3, small(3), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


def test_a_newer_format_is_refused(tmp_path):
    save_all(tmp_path, 1, 2)
    edit_about(tmp_path / "2", format_version=FORMAT_VERSION + 1)
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(small())
    assert f"checkpoint format {FORMAT_VERSION + 1}" in str(error.value) and "update" in str(error.value)


def test_another_model_is_refused_by_name(tmp_path):
    save_all(tmp_path, 1)
    other = small()
    other.params["table"] = jnp.zeros((64, 32))
    other.params["new"] = jnp.zeros(2)
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(other)
    assert "params/table: float32[64, 64] in the checkpoint, float32[64, 32] in the model" in str(error.value)
    assert "params/new: nothing in the checkpoint, float32[2] in the model" in str(error.value)


def test_another_kind_of_random_key_is_refused(tmp_path):
    save_all(tmp_path, 1)
    edit_about(tmp_path / "1", key_implementation="rbg")
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="JAX_DEFAULT_PRNG_IMPL=rbg"):
        checkpoints.restore(small())


# Saves that fail


def test_a_full_disk_costs_the_new_checkpoint_and_not_the_old(tmp_path, capfd):
    said: list[str] = []
    with open_checkpoints(tmp_path, said, keep_last=1) as checkpoints:
        checkpoints.save(1, small(1), {"index": 8})
        checkpoints.wait()
        with full_disk():
            checkpoints.save(2, small(2), {})
            checkpoints.wait()
        assert checkpoints.failed and checkpoints.steps() == [1]
        assert [p.name for p in tmp_path.iterdir()] == ["1"]  # the half that was written takes no room
        assert said == [
            "warning: checkpoint at step 2 could not be written: File too large; the last good one is step 1; "
            "training goes on"
        ]
        assert equal(checkpoints.restore(small()).state, small(1))
        checkpoints.save(3, small(3), {})
        checkpoints.wait()
        assert not checkpoints.failed and checkpoints.steps() == [3]  # and the policy holds again
    assert capfd.readouterr() == ("", "")  # no library adds its tracebacks to what is said


def test_the_third_failure_in_a_row_ends_the_run(tmp_path):
    said: list[str] = []
    with open_checkpoints(tmp_path, said) as checkpoints:
        with full_disk():
            checkpoints.save(1, small(), {})
            checkpoints.save(2, small(), {})  # says how the save before it went
            assert len(said) == 1 and "there is none before it" in said[0]
            checkpoints.save(3, small(), {})
            with pytest.raises(CheckpointError, match=r"step 3 could not be written: File too large.*3 in a row"):
                checkpoints.wait()
        assert checkpoints.failed and len(said) == 2


def test_a_folder_that_cannot_be_made_is_a_failure_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with open_checkpoints(tmp_path / "file" / "checkpoints", said) as checkpoints:
        checkpoints.save(1, small(), {})
        assert checkpoints.failed and "step 1 could not be written: " in said[0]


def test_a_save_that_hangs_is_named(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(), {})
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "SAVE_LIMIT_S", 0)
            patched.setattr(checkpoint, "_GRACE_S", 0)
            patched.setattr(checkpoints._orbax, "wait_until_finished", threading.Event().wait)
            with pytest.raises(CheckpointError, match="step 1 is still not written after 0 s"):
                checkpoints.wait()


# Digests


def test_the_digest_sees_every_bit_and_place():
    a = jnp.arange(24.0).reshape(4, 6)
    different = [
        a,
        a.at[3, 5].set(np.nextafter(np.float32(23), np.float32(24))),
        a.at[0, 0].set(-0.0),
        a.at[0, 0].set(jnp.nan),
        a[::-1],
        a.at[jnp.array([0, 1])].set(a[jnp.array([1, 0])]),
        a.T,
        a.reshape(6, 4),
        a.astype(jnp.bfloat16),
        a.astype(jnp.int32),
    ]
    digests = [digest({"a": x, "b": jnp.ones(2)}) for x in different]
    digests += [digest({"b": a, "a": jnp.ones(2)}), digest({"a": a}), digest({})]
    assert len(set(digests)) == len(digests)
    assert all(re.fullmatch("[0-9a-f]{16}", d) for d in digests)
    assert digest({"a": a, "b": jnp.ones(2)}) == digest({"b": np.ones(2, np.float32), "a": np.asarray(a)}) == digests[0]


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int8, jnp.uint32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32])
def test_the_digest_takes_every_type(dtype):
    a = jnp.array([0, 1, 1, 0], dtype)
    assert digest([a]) != digest([a[::-1].at[0].set(a[1])])
    assert digest([jnp.zeros((), dtype)]) != digest([jnp.ones((), dtype)])
    assert digest([jnp.zeros((0, 3), dtype)]) != digest([jnp.zeros((0,), dtype)])


def test_the_digest_does_not_depend_on_the_mesh():
    digests = {
        digest(state_on(MeshConfig(data=1), jax.devices()[:1])),
        digest(state_on(MeshConfig(data=8))),
        digest(state_on(MeshConfig(data=1, fsdp=4, tensor=2))),
    }
    assert len(digests) == 1
