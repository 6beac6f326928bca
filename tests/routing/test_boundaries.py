"""Chunking and dechunking against the same in loops, with room for all chunks and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.routing import boundaries as plain
from adaptive.routing.boundaries import Boundaries, gather, straight_through

pytestmark = pytest.mark.compiles

select_boundaries = jax.jit(plain.select_boundaries, static_argnums=1)
dechunk = jax.jit(plain.dechunk, static_argnames="smooth")
merged, chunk_statistics = jax.jit(plain.merged), jax.jit(plain.chunk_statistics)
ratio_losses = jax.jit(plain.ratio_losses, static_argnums=(2, 3))

BATCH, SEQ, WIDTH = 5, 23, 4
# Documents: one; three; one behind which nothing is; two, of which the second begins late; many of one position each.
SEGMENTS = np.array(
    [[1] * 23, [4] * 9 + [2] * 1 + [5] * 13, [1] * 6 + [0] * 17, [3] * 20 + [5] * 3, [*range(1, 13), *([13] * 11)]]
)


def example(segments=None, share=0.4, seed=0) -> Boundaries:
    """Boundaries at random, and at the first position of every document; none where nothing is."""
    rng = np.random.default_rng(seed)
    prob = rng.uniform(0, 1, (BATCH, SEQ)).astype(np.float32)
    wanted = rng.random((BATCH, SEQ)) < share
    segments = np.ones((BATCH, SEQ), int) if segments is None else segments
    first = np.diff(segments, axis=1, prepend=-1) != 0
    prob, wanted = np.where(first, 1, prob), (first | wanted) & (segments > 0)
    return Boundaries(jnp.asarray(prob), jnp.asarray(wanted))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def kept(wanted: np.ndarray, capacity: int) -> list[list[int]]:
    """Positions of the first `capacity` boundaries of each row."""
    return [[t for t in range(SEQ) if row[t]][:capacity] for row in np.asarray(wanted)]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["alone", "packed"])
@pytest.mark.parametrize("capacity", [1, 8, SEQ])
def test_the_first_boundaries_are_selected(capacity, segments):
    boundaries = example(segments)
    selection, mask = select_boundaries(boundaries, capacity)
    indices, valid = np.asarray(selection.indices), np.asarray(selection.valid)
    assert indices.shape == valid.shape == selection.weights.shape == (BATCH, capacity)
    assert indices.dtype == np.int32 and selection.weights.dtype == np.float32
    for row, positions in enumerate(kept(boundaries.wanted, capacity)):
        count = len(positions)
        assert indices[row, :count].tolist() == positions
        assert valid[row].tolist() == [True] * count + [False] * (capacity - count)
        assert len(set(indices[row])) == capacity and 0 <= indices[row].min() <= indices[row].max() < SEQ
        assert np.flatnonzero(mask[row]).tolist() == positions
        assert not set(indices[row, count:]) & set(positions)
        np.testing.assert_array_equal(selection.weights[row, :count], boundaries.prob[row][np.array(positions)])
        assert not selection.weights[row, count:].any()


def test_rows_of_every_fill():
    """From no boundary to all, at every capacity."""
    wanted = np.array([[False] * 4, [False, True, False, False], [True] * 4, [False, False, True, True]])
    for capacity in (1, 3, 4):
        selection, _ = select_boundaries(Boundaries(np.ones((4, 4), np.float32), wanted), capacity)
        assert np.asarray(selection.valid).sum(1).tolist() == [min(c, capacity) for c in (0, 1, 4, 2)]
        for row, own in zip(np.asarray(selection.indices), np.asarray(selection.valid), strict=True):
            assert len(set(row)) == capacity and np.all(np.diff(row[own]) > 0)


def test_a_demoted_boundary_depends_on_the_past_alone():
    boundaries = example(share=0.7)
    wanted = np.array(boundaries.wanted)
    wanted[:, 12:] ^= True
    later = boundaries._replace(wanted=jnp.asarray(wanted))
    for capacity in (1, 8):
        masks = [select_boundaries(b, capacity)[1][:, :12] for b in (boundaries, later)]
        np.testing.assert_array_equal(*masks)


# Dechunking


def loop(z, boundaries, capacity, segments, *, smooth, initial=None):
    """The moving average and its repetition, one position after another."""
    out = np.zeros((BATCH, SEQ, WIDTH))
    prob = np.asarray(boundaries.prob, np.float64)
    for row, positions in enumerate(kept(boundaries.wanted, capacity)):
        value = np.zeros(WIDTH) if initial is None else np.asarray(initial[row], np.float64)
        slot, document = -1, None
        for t in range(SEQ):
            if segments is not None and segments[row, t] != document:
                document, value = segments[row, t], np.zeros(WIDTH)
            if t in positions:
                slot += 1
                p = np.clip(prob[row, t], 1e-4, 1 - 1e-4) if smooth else 1.0
                value = p * np.asarray(z[row, slot], np.float64) + (1 - p) * value
            out[row, t] = value
    return out


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "sharp"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["alone", "packed"])
@pytest.mark.parametrize("capacity", [1, 8])
def test_dechunking_is_the_loop(capacity, segments, smooth):
    """Positions of a document none of whose boundaries found a slot read 0, and not their neighbour's chunk."""
    boundaries = example(segments)
    z = normal(BATCH, capacity, WIDTH)
    selection, mask = select_boundaries(boundaries, capacity)
    ids = None if segments is None else jnp.asarray(segments)
    got = dechunk(z, selection, mask, smooth=smooth, segments=ids)
    want = loop(z, boundaries, capacity, segments, smooth=smooth)
    np.testing.assert_allclose(got, want, atol=2e-6)
    if capacity == 1 and segments is not None:
        assert np.any(want[1, :9]) and not np.any(want[1, 9:]) and not np.any(np.asarray(got)[4, 1:])


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "sharp"])
def test_what_came_before_is_read_before_the_first_boundary(smooth):
    boundaries = example()
    wanted = np.array(boundaries.wanted)
    wanted[:, :3] = wanted[2] = False
    boundaries = boundaries._replace(wanted=jnp.asarray(wanted))
    z, initial = normal(BATCH, 6, WIDTH), np.ones((BATCH, WIDTH), np.float32)
    selection, mask = select_boundaries(boundaries, 6)
    got = dechunk(z, selection, mask, smooth=smooth, initial=jnp.asarray(initial))
    np.testing.assert_allclose(got, loop(z, boundaries, 6, None, smooth=smooth, initial=initial), atol=2e-6)
    assert np.all(np.asarray(got)[:, :3] == 1) and np.all(np.asarray(got)[2] == 1)


def test_the_gradient_of_dechunking_is_that_of_the_loop():
    """By finite differences of the loop, for z and the probabilities; slots that hold nothing have none."""
    boundaries, capacity = example(SEGMENTS), 4
    z = normal(BATCH, capacity, WIDTH)
    weight = np.random.default_rng(2).normal(size=(BATCH, SEQ, WIDTH))
    selection, mask = select_boundaries(boundaries, capacity)

    def loss(z, prob):
        selection, mask = select_boundaries(Boundaries(prob, boundaries.wanted), capacity)
        return (dechunk(z, selection, mask, smooth=True, segments=jnp.asarray(SEGMENTS)) * weight).sum()

    d_z, d_prob = jax.jit(jax.grad(loss, (0, 1)))(z, boundaries.prob)
    assert not np.any(np.asarray(d_z)[~np.asarray(selection.valid)])
    assert not np.any(np.asarray(d_prob)[~np.asarray(mask)])
    rng = np.random.default_rng(3)
    to_z, to_p = rng.normal(size=z.shape), rng.normal(size=boundaries.prob.shape) * (np.asarray(boundaries.prob) < 0.99)
    to_p *= np.asarray(boundaries.prob) > 0.01

    def along(step):
        moved = boundaries._replace(prob=np.asarray(boundaries.prob, np.float64) + step * to_p)
        return (loop(np.asarray(z) + step * to_z, moved, capacity, SEGMENTS, smooth=True) * weight).sum()

    want = (along(1e-5) - along(-1e-5)) / 2e-5
    assert (d_z * to_z).sum() + (d_prob * to_p).sum() == pytest.approx(want, rel=1e-4)


def test_chunking_everywhere_and_back_is_the_average_itself():
    everywhere = example()._replace(wanted=jnp.ones((BATCH, SEQ), bool))
    x = normal(BATCH, SEQ, WIDTH)
    selection, mask = select_boundaries(everywhere, SEQ)
    z = gather(x, selection.indices)
    np.testing.assert_array_equal(z, x)
    np.testing.assert_array_equal(dechunk(z, selection, mask, smooth=False), x)
    value, want = np.zeros((BATCH, WIDTH)), []
    for t in range(SEQ):
        p = np.clip(np.asarray(everywhere.prob)[:, t : t + 1], 1e-4, 1 - 1e-4)
        value = p * np.asarray(x)[:, t] + (1 - p) * value
        want.append(value)
    np.testing.assert_allclose(dechunk(z, selection, mask, smooth=True), np.stack(want, 1), atol=2e-6)


def test_the_first_chunk_too_is_clipped():
    one = Boundaries(jnp.ones((1, 3)), jnp.asarray([[True, False, False]]))
    selection, mask = select_boundaries(one, 2)
    got = dechunk(jnp.ones((1, 2, 1)), selection, mask, smooth=True)
    np.testing.assert_allclose(got, np.full((1, 3, 1), 0.9999), rtol=1e-6)


# Merging


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["alone", "packed"])
@pytest.mark.parametrize("capacity", [1, 8])
def test_merged_vectors_are_sums_since_the_boundary_before(capacity, segments):
    boundaries = example(segments)
    x = normal(BATCH, SEQ, WIDTH)
    selection, _ = select_boundaries(boundaries, capacity)
    ids = None if segments is None else jnp.asarray(segments)
    got = np.asarray(merged(x, selection, ids))
    for row, positions in enumerate(kept(boundaries.wanted, capacity)):
        for slot, t in enumerate(positions):
            document = range(SEQ) if segments is None else np.flatnonzero(segments[row] == segments[row, t])
            begin = positions[slot - 1] + 1 if slot and (positions[slot - 1] in document) else 0
            if segments is not None:
                begin = max(begin, max([i + 1 for i in range(t) if segments[row, i] != segments[row, t]], default=0))
            np.testing.assert_allclose(got[row, slot], np.asarray(x)[row, begin : t + 1].sum(0), atol=1e-5)


# Losses and statistics


def test_the_straight_through_estimator_is_one_with_a_gradient():
    confidence = jnp.asarray([0.5, 0.1, 0.999999, 1e-8, 1 / 3, 1.0])
    value, pull = jax.vjp(straight_through, confidence)
    assert np.all(np.asarray(value) == 1)
    np.testing.assert_array_equal(pull(jnp.arange(6.0))[0], np.arange(6.0))


def shares(boundary: float, probability: float, n: int = 120) -> Boundaries:
    """A row of n positions with this share of boundaries and this mean probability."""
    wanted = np.arange(n) < round(boundary * n)
    return Boundaries(jnp.full((1, n), probability, jnp.float32), jnp.asarray(wanted[None]))


@pytest.mark.parametrize("target", [1.5, 3.0, 6.0])
def test_the_ratio_loss_by_its_formula(target):
    everything = jnp.ones((1, 120), bool)
    at = lambda f, g: float(ratio_losses(shares(f, g), everything, target, 1)["global"].value)  # noqa: E731
    assert at(1 / target, 1 / target) == pytest.approx(1, rel=1e-5)
    for f, g in [(0.25, 0.4), (0.5, 0.1), (1.0, 1.0), (0.0, 0.0)]:
        n = target
        assert at(f, g) == pytest.approx(n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g)), rel=1e-5)
    assert at(1, 1) == pytest.approx(target, rel=1e-5)


@pytest.mark.parametrize(("share", "sign"), [(0.1, -1), (0.25, 0), (0.6, 1)])
def test_the_ratio_loss_pulls_to_its_target(share, sign):
    """The gradient of every probability is N (N F - 1) / ((N - 1) L): up below the target, down above it."""
    everything = jnp.ones((1, 120), bool)
    loss = lambda p: ratio_losses(shares(share, 0)._replace(prob=p), everything, 4.0, 1)["global"].value  # noqa: E731
    got = np.asarray(jax.grad(loss)(jnp.full((1, 120), 0.3)))
    np.testing.assert_allclose(got, 4 * (4 * share - 1) / (3 * 120), atol=1e-8)
    assert np.all(np.sign(np.round(got, 7)) == sign)


def test_ratio_losses_of_the_batch_and_of_devices():
    """Shares of all positions, or the mean of four devices' own losses; what does not exist does not count."""
    rng = np.random.default_rng(0)
    prob, wanted = rng.random((8, 12)).astype(np.float32), rng.random((8, 12)) < np.linspace(0.1, 0.9, 8)[:, None]
    valid = np.arange(12) < rng.integers(1, 13, 8)[:, None]
    got = ratio_losses(Boundaries(jnp.asarray(prob), jnp.asarray(wanted)), jnp.asarray(valid), 3.0, 4)

    def loss(rows):
        f, g = wanted[rows][valid[rows]].mean(), prob[rows][valid[rows]].mean()
        return 1.5 * (2 * f * g + (1 - f) * (1 - g))

    devices = [loss(slice(i, i + 2)) for i in range(0, 8, 2)]
    assert float(got["global"].value) == pytest.approx(loss(slice(None)), rel=1e-5)
    assert float(got["device"].value) == pytest.approx(np.mean(devices), rel=1e-5)
    assert abs(got["global"].value - got["device"].value) > 1e-2


def test_demoted_boundaries_count_as_boundaries():
    """So that the loss pushes back where slots are too few."""
    boundaries = example(share=0.9)
    valid = jnp.ones((BATCH, SEQ), bool)
    want = ratio_losses(boundaries, valid, 6.0, 1)["global"].value
    _, mask = select_boundaries(boundaries, 2)
    assert want > ratio_losses(boundaries._replace(wanted=mask), valid, 6.0, 1)["global"].value


def test_statistics_of_a_stage():
    prob = np.array([[1, 0.52, 0.1, 0.9, 0.3, 0.7], [1, 0.4, 0.9, 0.9, 0.2, 0.2]], np.float32)
    valid = np.array([[True] * 6, [True] * 4 + [False] * 2])
    wanted = (prob > 0.5) & valid
    _, mask = select_boundaries(Boundaries(prob, wanted), 3)
    got = {k: float(v) for k, v in chunk_statistics(Boundaries(prob, wanted), mask, valid).items()}
    own = prob[valid]
    want = {
        "kept": 6 / 10, "probability": own.mean(), "probability_std": own.std(),
        "near_half": 1 / 10, "overflow": 1 / 7,
    }  # fmt: skip
    assert got == pytest.approx(want, rel=1e-5)
