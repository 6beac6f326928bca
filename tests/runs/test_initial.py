"""A new run that begins from a checkpoint of another: what it takes, what stays its own, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adaptive.errors import CheckpointError, RecipeError
from adaptive.recipe import Recipe
from adaptive.runs import initial
from adaptive.runs.checkpoint import Checkpoints
from adaptive.runs.config import CheckpointConfig, InitConfig
from adaptive.runs.folder import RunFolder
from adaptive.runs.state import TrainState

pytestmark = pytest.mark.compiles

RECIPE = Recipe(name="other")
TX = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda count: 0.1 * count))


def state_of(value, size=3):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    full = lambda *shape: jnp.full(shape, value, jnp.float32, device=here)  # noqa: E731
    params = nnx.State({"body": {"norm": nnx.Param(full(2))}, "embedding": nnx.Param(full(size, 2))})
    buffers = nnx.State({"bias": nnx.BatchStat(full(2))})
    opt = jax.tree.map(lambda a: jnp.full_like(a, value), TX.init(params))
    count = jnp.full((), value, jnp.int32, device=here)
    return TrainState(count, count, params, buffers, opt, jnp.full(2, value, jnp.uint32, device=here))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose state is all sevens at step 7."""
    workdir = tmp_path_factory.mktemp("other") / "run"
    RunFolder.open(workdir, RECIPE, say=lambda line: None).close()
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig(), {}, say=lambda line: None)
    checkpoints.save(7, state_of(7), {})
    checkpoints.close()
    return workdir


def values(state):
    return {name: {float(x) for x in np.unique(leaf)} for name, leaf in initial.named(state).items()}


def test_weights_are_taken_and_all_else_is_the_new_runs(run):
    found = values(initial.begun(InitConfig(str(run), 7), state_of(1)))
    taken = {name for name, value in found.items() if value == {7.0}}
    assert taken == {"params/body/norm", "params/embedding", "buffers/bias"}
    assert all(value == {1.0} for name, value in found.items() if name not in taken)


def test_the_optimizers_state_is_taken_but_for_the_place_in_the_schedule(run):
    found = values(initial.begun(InitConfig(str(run), 7, optimizer=True), state_of(1)))
    own = {name for name, value in found.items() if value == {1.0}}
    assert own == {"step", "skipped", "key", "opt/1/count"}
    assert found["opt/0/count"] == found["opt/0/mu/embedding"] == {7.0}


def test_parameters_that_begin_anew_may_have_other_shapes(run):
    init = InitConfig(str(run), 7, optimizer=True, fresh=("embedding",))
    found = values(initial.begun(init, state_of(1, size=5)))
    assert found["params/embedding"] == found["opt/0/nu/embedding"] == {1.0}
    assert found["params/body/norm"] == found["opt/0/nu/body/norm"] == {7.0}


def test_what_does_not_fit_is_named(run):
    with pytest.raises(CheckpointError) as error:
        initial.begun(InitConfig(str(run), 7), state_of(1, size=5))
    text = str(error.value)
    assert "params/embedding: float32[3, 2] in the checkpoint, float32[5, 2] in the model" in text
    assert "init.fresh=PATH" in text
    with pytest.raises(RecipeError, match=r"init\.fresh=embeding: no parameter is called so; nearest: embedding"):
        initial.begun(InitConfig(str(run), 7, fresh=("embeding",)), state_of(1))


def test_a_run_and_a_step_of_it_are_found(run, tmp_path):
    want = [f"init.run={run}", "init.step=7"]
    assert initial.settings_of(str(run), None) == initial.settings_of(f"{run}@7", tmp_path) == want
    with pytest.raises(CheckpointError, match="no checkpoint of step 8"):
        initial.settings_of(f"{run}@8", None)
    with pytest.raises(CheckpointError, match="no such folder"):
        initial.settings_of(str(tmp_path / "absent"), None)
    RECIPE.with_(*want, "init.optimizer=true").validate()
    with pytest.raises(RecipeError, match=r"--init_from RUN"):
        RECIPE.with_("init.optimizer=true").validate()


def test_a_run_that_was_begun_from_a_step_stays_so(run, tmp_path):
    """Though the other run went on, or is gone."""
    begun = RECIPE.with_(f"init.run={run}", "init.step=4")
    RunFolder.open(tmp_path / "new", begun, say=lambda line: None).close()
    assert initial.settings_of(str(run), tmp_path / "new") == [f"init.run={run}", "init.step=4"]
