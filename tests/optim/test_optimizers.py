"""Optimizers: Muon against optax's own, what it leaves to AdamW, and where its state lives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
from flax import nnx
from optax import contrib
from train_steps import compiled_step, packed_batch

from adaptive.layers.site import param
from adaptive.optim.build import make_optimizer
from adaptive.optim.config import ScheduleConfig
from adaptive.optim.groups import updated_by_muon
from adaptive.optim.optimizers import adamw, muon
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import AxisRules
from adaptive.runs.state import state_shardings

pytestmark = pytest.mark.compiles

CONSTANT = ScheduleConfig(kind="constant")


def test_muon_is_that_of_optax():
    """Matrices in one stack, heads that are dimensions, experts: each as a matrix alone; the rest as AdamW does."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = {"stacked": draw(2, 8, 6), "q": draw(8, 2, 3), "o": draw(2, 3, 8), "experts": draw(3, 4, 5)}
    weights |= {"embedding": draw(9, 8), "scale": draw(8)}
    gradients = [{name: draw(*value.shape) for name, value in weights.items()} for _ in range(2)]

    about = {
        "stacked": {"axes": ("width", "ff"), "stack": (2,), "role": "matrix"},
        "q": {"axes": ("width", "heads", None), "role": "matrix"},
        "o": {"axes": ("heads", None, "width"), "role": "matrix"},
        "experts": {"axes": ("experts", "width", "expert_ff"), "role": "matrix"},
        "embedding": {"axes": ("vocab", "width"), "role": "matrix"},
        "scale": {"axes": (None,), "role": "scale"},
    }
    own = lambda values: nnx.State({n: param(jnp.asarray(v), **about[n]) for n, v in values.items()})  # noqa: E731
    tx = make_optimizer(muon.Settings(learning_rate=0.1, weight_decay=0.2, clip_norm=1e9), CONSTANT, 9)
    ours = after(tx, own(weights), [own(g) for g in gradients])

    def apart(values):
        matrices = {"q": values["q"].reshape(8, 6), "o": values["o"].reshape(6, 8)}
        matrices |= {f"{name}{i}": one for name in ("stacked", "experts") for i, one in enumerate(values[name])}
        return matrices, {name: values[name] for name in ("embedding", "scale")}

    matrices, others = apart(weights)
    theirs = after(contrib.muon(0.1, weight_decay=0.2, consistent_rms=0.2), matrices, [apart(g)[0] for g in gradients])
    plain = after(
        optax.adamw(0.1, b2=0.95, weight_decay=0.2, mask={"embedding": True, "scale": False}),
        others, [apart(g)[1] for g in gradients],
    )  # fmt: skip
    found, rest = apart({name: value[...] for name, value in ours.items()})
    for name, value in {**theirs, **plain}.items():
        np.testing.assert_allclose({**found, **rest}[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def after(tx, params, gradients):
    @jax.jit
    def steps(params, gradients):
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return steps(params, gradients)


MODEL = shapes.hnet(("m1", ("T1",), "t1"), widths=(8, 12))


def test_embeddings_head_kernels_and_vectors_are_left_to_adamw():
    params = nnx.state(nnx.eval_shape(lambda: MODEL.build(jax.random.key(0))), nnx.Param)
    flat = {"/".join(map(str, path)): own for path, own in nnx.to_flat_state(updated_by_muon(params))}
    muons = {path.rpartition("/")[2] for path, own in flat.items() if own.get_raw_value() == "muon"}
    assert muons == {"q", "k", "v", "o", "gate", "up", "down", "z", "x", "bc", "dt", "out", "weight"}
    others = {path.rpartition("/")[2] for path, own in flat.items() if own.get_raw_value() == "adamw"}
    assert {"embedding", "head", "conv_x", "conv_bc", "a_log", "d", "norm", "bias", "pad"} <= others
    assert {path for path in flat if path.endswith("norm/weight") and flat[path].get_raw_value() == "muon"} == set()


def test_momenta_live_where_their_matrices_do():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model = shapes.plain(2)
    where = state_shardings(model.build, make_optimizer(muon.Settings(), CONSTANT, 9), mesh, AxisRules())
    named = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(where)}
    specs = [spec for path, spec in named.items() if "'q'" in path or ".q" in path]
    assert len(specs) == 2 and len(set(specs)) == 1 and "tensor" in str(specs[0])  # the matrix and its one momentum


def test_muon_learns():
    model = shapes.plain(1, vocab_size=40, hidden=24)
    tx = make_optimizer(muon.Settings(learning_rate=0.02), CONSTANT, 9)
    program = compiled_step(model, tx, (1, 1, 1, 1), 2, 16)
    state, losses, batch = program.state(), [], packed_batch(2, 16, 40)
    for _ in range(6):
        state, metrics = program.run(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0] and not int(state.skipped)


def test_adamw_keeps_the_places_of_its_moments():
    """Checkpoints name them."""
    params = nnx.State({"w": param(jnp.ones((2, 2)), (None, None), role="matrix")})
    state = jax.eval_shape(make_optimizer(adamw.Settings(), CONSTANT, 9).init, params)
    adam = state.inner_states["main"].inner_state[1]
    assert isinstance(adam, optax.ScaleByAdamState) and adam.mu["w"].shape == (2, 2)
