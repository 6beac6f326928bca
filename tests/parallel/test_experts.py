"""Every way to compute experts on a mesh computes what one device computes, values and gradients."""

import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from adaptive.errors import MeshError, RecipeError
from adaptive.parallel.config import ExpertParallel, MeshConfig
from adaptive.parallel.experts import receive_rows, run
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.pairs import combine, take
from adaptive.parallel.rules import AxisRules, axis_rules, gathered, placement
from adaptive.routing.dispatch import Dispatch, by_expert, by_token, to_rows, to_slots

pytestmark = pytest.mark.compiles

BATCH, SEQ, WIDTH, HIDDEN, EXPERTS, K = 8, 4, 8, 16, 8, 2
AXES = {"up": ("experts", "width", "expert_ff"), "down": ("experts", "expert_ff", "width")}


class Reference:
    """Of rows [rows, D], every expert on all of them, masked."""

    def rows(self, weights, rows, group_sizes):
        if group_sizes is None:
            hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", rows, weights["up"]))
            return jnp.einsum("ecf,efd->ecd", hidden, weights["down"])
        ends = jnp.cumsum(group_sizes)
        number = jnp.arange(len(rows))
        mine = ((number >= (ends - group_sizes)[:, None]) & (number < ends[:, None])).astype(rows.dtype)
        hidden = jax.nn.silu(jnp.einsum("rd,edf->erf", rows, weights["up"]))
        return jnp.einsum("er,erf,efd->rd", mine, hidden, weights["down"])

    def summed(self, weights, x, tokens, scale, place, group_sizes):
        out = self.rows(weights, take(x, tokens, place), group_sizes)
        return combine(out, scale, tokens, place, len(x))


@functools.cache
def arrays(seed: int = 0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = {"up": normal(EXPERTS, WIDTH, HIDDEN), "down": normal(EXPERTS, HIDDEN, WIDTH)}
    return normal(BATCH, SEQ, WIDTH), weights, normal(BATCH, SEQ, WIDTH)


def token_choice(kind: str = "random") -> tuple[Dispatch, np.ndarray]:
    """(dispatch, expert of each pair): token choice with some pairs invalid."""
    rng = np.random.default_rng(1)
    score = rng.random((BATCH, SEQ, EXPERTS))
    if kind == "empty":
        score[..., 2:] -= 10.0  # six experts have no token
    if kind == "one":
        score[..., 3] += 10.0  # one has them all
    index = np.argsort(-score, axis=-1)[..., :K].astype(np.int32)
    valid = rng.random(index.shape) > 0.1
    if kind == "one":
        valid[..., 1:] = False
    weights = rng.random(index.shape).astype(np.float32)
    return by_token(jnp.asarray(index), jnp.asarray(weights), jnp.asarray(valid), EXPERTS), np.where(valid, index, -1)


def expert_choice() -> Dispatch:
    rng = np.random.default_rng(2)
    capacity = 3  # not a multiple of two
    index = np.argsort(rng.random((BATCH, EXPERTS, SEQ)), axis=-1)[..., :capacity].astype(np.int32)
    weights = rng.random(index.shape).astype(np.float32)
    return by_expert(jnp.asarray(index), jnp.asarray(weights), jnp.asarray(rng.random(index.shape) > 0.2), SEQ)


DISPATCHES = {
    "random": lambda: token_choice()[0],
    "empty": lambda: token_choice("empty")[0],
    "one": lambda: token_choice("one")[0],
    "expert_choice": expert_choice,
}


def loss(x, scale, weights, dispatch, direction, ragged):
    dispatch = dataclasses.replace(dispatch, weights=jnp.where(dispatch.valid, scale, 0.0))
    y, lost = run(x, dispatch, weights, AXES, to_rows if ragged else to_slots, Reference())
    return (y * direction).sum(), (y, lost)


def computed(dispatch, ragged, mesh=None, settings=None):
    """(y, lost, gradients of x, of the combine weights and of the matrices)."""
    x, weights, direction = arrays()
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="ragged")
    args = (x, dispatch.weights, weights, dispatch, direction)
    if mesh is None:
        grads, (y, lost) = step(*args, ragged=ragged)
    else:
        devices = jax.devices()[: int(np.prod(mesh))]
        with placement(make_mesh(MeshConfig(*mesh), devices), axis_rules(settings), settings):
            grads, (y, lost) = step(*args, ragged=ragged)
    return jax.tree.map(np.asarray, (y, lost, *grads))


@functools.cache
def on_one_device(name: str, ragged: bool):
    return computed(DISPATCHES[name](), ragged)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


MESHES = [(2, 2, 1, 2), (1, 1, 2, 1), (2, 1, 4, 1), (1, 1, 8, 1), (1, 2, 2, 2)]


@pytest.mark.parametrize("name", DISPATCHES)
def test_slots_and_rows_agree_with_the_dense_reference(name):
    dispatch = DISPATCHES[name]()
    x, weights, _ = arrays()
    tokens = x.reshape(-1, WIDTH)
    every = jax.nn.silu(jnp.einsum("td,edf->etf", tokens, weights["up"]))
    every = jnp.einsum("etf,efd->etd", every, weights["down"])
    want = jnp.einsum("te,etd->td", dispatch.combine_matrix(), every).reshape(x.shape)
    assert_same(on_one_device(name, True)[0], want)
    assert_same(on_one_device(name, False), on_one_device(name, True))


# Every two of a strategy, a mesh, and slots or rows.
STRATEGIES = ["expert", "gather", "data", "tensor"]
EVERY_TWO = [(s, m, (i + j) % 2 == 1) for i, s in enumerate(STRATEGIES) for j, m in enumerate(MESHES)]


@pytest.mark.parametrize(("strategy", "mesh", "ragged"), EVERY_TWO, ids=str)
def test_every_strategy_equals_one_device(strategy, mesh, ragged):
    got = computed(DISPATCHES["random"](), ragged, mesh, ExpertParallel(strategy))
    assert_same(got, on_one_device("random", ragged))


@pytest.mark.parametrize("ragged", [False, True], ids=["slots", "rows"])
@pytest.mark.parametrize("strategy", ["expert", "gather", "tensor"])
@pytest.mark.parametrize("name", ["empty", "one", "expert_choice"])
def test_experts_without_tokens_and_one_that_has_all(name, strategy, ragged):
    got = computed(DISPATCHES[name](), ragged, (1, 1, 4, 1), ExpertParallel(strategy))
    assert_same(got, on_one_device(name, ragged))


@pytest.mark.parametrize(("overlap", "ragged"), [(2, False), (2, True), (3, True), (5, False)])
def test_parts_that_overlap(overlap, ragged):
    """Capacities and rows that the number of parts does not divide."""
    got = computed(DISPATCHES["random"](), ragged, (1, 1, 4, 1), ExpertParallel("expert", overlap=overlap))
    assert_same(got, on_one_device("random", ragged))


@pytest.mark.parametrize(("devices", "nodes"), [(4, 2), (8, 2), (8, 4)])
def test_within_nodes_and_then_between(devices, nodes):
    settings = ExpertParallel("expert", "hierarchical", nodes, overlap=2)
    settings.validate(devices=devices, experts=EXPERTS)
    got = computed(DISPATCHES["random"](), False, (1, 1, devices, 1), settings)
    assert_same(got, on_one_device("random", False))


@pytest.mark.parametrize("strategy", ["expert", "gather"])
@pytest.mark.parametrize(("name", "factor"), [("random", 1.0), ("random", 0.5), ("one", 1.0), ("empty", 0.7)])
def test_truncated_buffers_lose_what_the_rule_says(name, factor, strategy):
    """Each device keeps the first rows that fit, by source (MaxText): Tr = differences of min(cumsum(A), R)."""
    devices = 4
    dispatch = DISPATCHES[name]()
    _, chosen = token_choice(name)
    pairs = chosen.reshape(devices, -1)  # of each source, in the order of its tokens
    per_device = EXPERTS // devices
    wanted = np.array([[(p >= 0) & (p // per_device == d) for d in range(devices)] for p in pairs]).sum(-1)
    room = int(pairs.shape[1] * factor)
    kept = np.diff(np.minimum(np.cumsum(wanted, 0), room), axis=0, prepend=0)
    assert (wanted - kept).sum() > 0 or name == "random"

    settings = ExpertParallel(strategy, buffer_factor=factor)
    got = computed(dispatch, True, (1, 1, devices, 1), settings)
    assert got[1] == (wanted - kept).sum()

    # What is lost is out of the sum: the same as a dispatch without those pairs.
    left = np.zeros(chosen.shape, bool).reshape(devices, -1)
    for source, p in enumerate(pairs):
        for d in range(devices):
            mine = np.flatnonzero((p >= 0) & (p // per_device == d))
            by_its_expert = mine[np.argsort(p[mine], kind="stable")]
            left[source, by_its_expert[: kept[source, d]]] = True
    thinned = by_token(dispatch.index, dispatch.weights, jnp.asarray(left.reshape(chosen.shape)), EXPERTS)
    want = computed(thinned, True)
    assert want[1] == 0
    assert_same((got[0], got[2:]), (want[0], want[2:]))


@pytest.mark.parametrize(
    ("sent", "devices", "experts", "k", "factor", "rows"),
    [
        (1024, 4, 256, 8, -1, 4096),
        (1024, 128, 256, 8, -1, 32768),
        (1024, 4, 256, 8, 1.5, 1536),
        (4096, 8, 8, 2, -1, 16384),
    ],
)
def test_receive_buffers(sent, devices, experts, k, factor, rows):
    """MaxText's sizes; `sent` rows are k for each token."""
    most = min(sent, experts // devices * (sent // k))
    assert receive_rows(sent, devices, most, factor) == rows


def collectives(settings: ExpertParallel, mesh, ragged=False) -> dict[str, int]:
    """Of the forward pass alone."""
    x, weights, _ = arrays()
    dispatch = DISPATCHES["random"]()
    m, rules = make_mesh(MeshConfig(*mesh)), axis_rules(settings)
    with placement(m, rules, settings):
        put = lambda a, *names: jax.device_put(a, NamedSharding(m, rules.spec(*names)))  # noqa: E731
        forward = jax.jit(lambda x, d, w: run(x, d, w, AXES, to_rows if ragged else to_slots, Reference()))
        whole = {name: tuple(None if n == "width" else n for n in AXES[name]) for name in AXES}
        args = (
            put(x, "batch"), jax.tree.map(lambda a: put(a, "batch"), dispatch),
            {name: put(w, *whole[name]) for name, w in weights.items()},
        )  # fmt: skip
        return hlo.collectives(forward.lower(*args).compile().as_text())


@pytest.mark.parametrize(
    ("settings", "mesh", "want"),
    [
        (ExpertParallel("expert"), (8, 1, 1, 1), {}),
        (ExpertParallel("expert"), (1, 1, 8, 1), {"all-to-all": 2}),
        (ExpertParallel("expert", overlap=2), (1, 1, 8, 1), {"all-to-all": 4}),
        (ExpertParallel("expert", "hierarchical", 2), (1, 1, 8, 1), {"all-to-all": 4}),
        (ExpertParallel("gather"), (1, 1, 8, 1), {"all-gather": 3, "reduce-scatter": 1}),  # tokens, slots, weights
        (ExpertParallel("tensor"), (1, 1, 8, 1), {"all-gather": 3, "reduce-scatter": 1}),
        (ExpertParallel("data"), (1, 1, 8, 1), {"all-gather": 2}),  # both matrices
        (ExpertParallel("expert"), (1, 1, 4, 2), {"all-reduce": 1, "all-to-all": 2}),
    ],
)
def test_collectives_of_slots(settings, mesh, want):
    assert collectives(settings, mesh) == want


def test_collectives_of_rows():
    """Group sizes are gathered; off TPU and GPU the ragged all-to-alls are padded ones. A bound on the buffers adds the
    count of what is lost."""
    want = {"all-gather": 1, "all-to-all": 2}
    assert collectives(ExpertParallel("expert"), (1, 1, 8, 1), ragged=True) == want
    bounded = ExpertParallel("expert", buffer_factor=1.5)
    assert collectives(bounded, (1, 1, 8, 1), ragged=True) == {**want, "all-reduce": 1}


def test_gradients_are_summed_where_the_matrices_are_stored():
    """A device receives its share of each sum, first of experts, then of the width; nobody receives all of it."""
    x, weights, direction = arrays()
    dispatch, settings, mesh = DISPATCHES["random"](), ExpertParallel("data"), make_mesh(MeshConfig(1, 8, 1, 1))
    with placement(mesh, axis_rules(settings), settings):

        def step(stored):
            ready = {name: gathered(w, AXES[name], jnp.float32) for name, w in stored.items()}
            return loss(x, dispatch.weights, ready, dispatch, direction, True)[0]

        rules = axis_rules(settings)
        put = {name: jax.device_put(w, NamedSharding(mesh, rules.spec(*AXES[name]))) for name, w in weights.items()}
        text = jax.jit(jax.grad(step)).lower(put).compile().as_text()
    found = hlo.collectives(text)
    assert found["reduce-scatter"] == found["all-to-all"] == 2 and "all-reduce" not in found


def test_settings_that_do_not_fit():
    for settings, devices, parts in [
        (ExpertParallel(), 3, ["mesh.expert=3 does not divide the 8 experts", "1, 2, 4, 8", "strategy=tensor"]),
        (ExpertParallel(nodes=3), 4, ["nodes=3 does not divide mesh.expert=4", "1, 2, 4"]),
        (ExpertParallel(exchange="hierarchical"), 4, ["nodes=1", "above 1 and below mesh.expert"]),
        (ExpertParallel("gather", "hierarchical", 2), 4, ["strategy=gather exchanges no tokens"]),
        (ExpertParallel("data", overlap=2), 4, ["overlap=2", "strategy=data exchanges no tokens"]),
        (ExpertParallel(buffer_factor=0), 4, ["buffer_factor=0", "above 0, or -1"]),
    ]:
        with pytest.raises(RecipeError) as error:
            settings.validate(devices=devices, experts=EXPERTS)
        for part in parts:
            assert part in str(error.value)
    ExpertParallel("tensor").validate(devices=3, experts=EXPERTS)
    with pytest.raises(RecipeError, match="no experts"):
        ExpertParallel().validate(devices=2, experts=0)
    with pytest.raises(RecipeError, match="sent directly"):
        ExpertParallel("expert", "hierarchical", 2).validate(devices=4, experts=EXPERTS, ragged=True)
    with pytest.raises(RecipeError, match="fixed capacity"):
        ExpertParallel("expert", buffer_factor=1.5).validate(devices=4, experts=EXPERTS, ragged=False)
    with pytest.raises(ValueError, match="settle"):
        axis_rules(ExpertParallel())
    with (
        pytest.raises(ValueError, match="not strategy=tensor"),
        placement(make_mesh(MeshConfig()), AxisRules(), ExpertParallel("tensor")),
    ):
        pass


def test_a_batch_that_does_not_divide_is_refused():
    settings = ExpertParallel("expert")
    x, weights, _ = arrays()
    dispatch = jax.tree.map(lambda a: a[:6], DISPATCHES["random"]())
    mesh = make_mesh(MeshConfig(1, 1, 4, 1), jax.devices()[:4])
    with placement(mesh, axis_rules(settings), settings), pytest.raises(MeshError, match="multiple of 4"):
        run(x[:6], dispatch, weights, AXES, to_slots, Reference())
