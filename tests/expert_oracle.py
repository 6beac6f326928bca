"""A numpy reference of expert layers in float64, and the comparison of a layer with it.

A router's reference is a function (weights, x [batch, seq, width]) -> Decision, written from the formulas. Its
selection must not change under tiny changes of the weights, so that finite differences give its slopes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from flax import nnx

from adaptive.layers.feed_forwards import FeedForward
from adaptive.layers.moe import layer_from_weights
from adaptive.layers.moe.base import Context, RoutedLayer, Routing
from adaptive.models.language_model import LanguageModel


@dataclasses.dataclass
class Decision:
    """combine [batch, seq, experts + zero]; losses before coefficients; zero [batch, seq, width]: of zero experts."""

    combine: np.ndarray
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    zero: np.ndarray | float = 0.0
    scale: float = 1.0


Reference = Callable[[dict[str, np.ndarray], np.ndarray], Decision]


def weights_of(experts: int, choices: int, *, width=6, hidden=5, gated=True, seed=0, spread=1.0, **extra) -> dict:
    """Explicit weights of a small layer; `extra` are shapes of the router's further parameters."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    weights = {"router.weight": spread * draw(width, choices), "experts.up": draw(experts, width, hidden) / 2}
    if gated:
        weights["experts.gate"] = draw(experts, width, hidden) / 2
    weights["experts.down"] = draw(experts, hidden, width) / 2
    return weights | {f"router.{name}": draw(*shape) for name, shape in extra.items()}


def inputs(batch=2, seq=8, width=6, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, seq, width))


def softmax(a: np.ndarray) -> np.ndarray:
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """bool, the k largest of the last axis, ties to the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def output(weights: dict, x: np.ndarray, decision: Decision) -> np.ndarray:
    """Every expert on every token, weighted."""
    rows = x * decision.scale
    up = np.einsum("bsd,edf->bsef", rows, weights["experts.up"])
    hidden = silu(up)
    if "experts.gate" in weights:
        hidden = silu(np.einsum("bsd,edf->bsef", rows, weights["experts.gate"])) * up
    out = np.einsum("bsef,efd->bsed", hidden, weights["experts.down"])
    experts = out.shape[2]
    return np.einsum("bsed,bse->bsd", out, decision.combine[..., :experts]) + decision.zero


def compare(layer: RoutedLayer, reference: Reference, weights: dict, x: np.ndarray, *, context=Context()) -> None:  # noqa: B008
    """Selections, weights, outputs, losses, and gradients of all weights and the input by finite differences."""
    rng = np.random.default_rng(7)
    decision = reference(weights, x)
    y = output(weights, x, decision)
    cotangent = rng.normal(size=y.shape)
    share = {name: rng.normal() for name in sorted(decision.losses)}

    graphdef, state = nnx.split(layer)

    def ours(state, x):
        y, routing = nnx.merge(graphdef, state).routed(x, context)
        value = (y * cotangent).sum() + sum(share[name] * routing.losses[name].value for name in share)
        losses = {name: loss.value for name, loss in routing.losses.items()}
        return value, (y, routing.dispatch.combine_matrix(), losses)

    params = nnx.filter_state(state, nnx.Param)
    rest = nnx.filter_state(state, nnx.Not(nnx.Param))
    run = jax.jit(jax.value_and_grad(lambda p, x: ours(nnx.merge_state(p, rest), x), (0, 1), has_aux=True))
    (_, (got, combine, losses)), (grads, grad_x) = run(params, jnp.asarray(x, jnp.float32))

    combine = np.asarray(combine).reshape(decision.combine.shape)
    np.testing.assert_array_equal(combine != 0, decision.combine != 0)
    np.testing.assert_allclose(combine, decision.combine, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(got, y, atol=2e-5, rtol=2e-5)
    for name, value in decision.losses.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-5, err_msg=name)

    def value(weights, x):
        d = reference(weights, x)
        return (output(weights, x, d) * cotangent).sum() + sum(share[n] * v for n, v in d.losses.items())

    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(grads)}
    for name, grad in (flat | {"x": grad_x}).items():
        grad = np.asarray(grad, np.float64)
        directions = rng.normal(size=(6, *grad.shape))  # every entry of a gradient has a part in each
        slopes = [slope(value, weights, x, name, direction) for direction in directions]
        got, size = (directions * grad).reshape(6, -1).sum(1), np.linalg.norm(grad)
        np.testing.assert_allclose(got, slopes, atol=2e-4 * max(size, 1e-3), rtol=0, err_msg=name)


def slope(value, weights: dict, x: np.ndarray, name: str, direction: np.ndarray, step: float = 1e-6) -> float:
    """Central difference of value(weights, x) by the array `name` in a direction of its shape."""
    arrays = weights | {"x": x}
    ends = []
    for sign in (1, -1):
        moved = arrays | {name: arrays[name] + sign * step * direction}
        ends.append(value({key: moved[key] for key in weights}, moved["x"]))
    return (ends[0] - ends[1]) / (2 * step)


def close(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Within 2e-4 of the tensor's largest entry."""
    np.testing.assert_allclose(got, expected, atol=2e-4 * max(np.abs(expected).max(), 1e-3), rtol=0, err_msg=name)


def build(router: str, weights: dict, options: dict | None = None, **settings) -> RoutedLayer:
    return layer_from_weights(router, weights, options=options or {}, **settings)


def model_of(feed_forward: FeedForward, layers: int = 2) -> LanguageModel:
    """A small transformer with this feed-forward in every layer."""
    size = {"width": 16, "heads": 2, "kv_heads": 1, "init_std": 0.3, "embedding_std": 0.3}
    return shapes.plain(layers, feed_forward=feed_forward, **size).build(jax.random.key(0))


def run(layer: RoutedLayer, x: np.ndarray, **context) -> tuple[jax.Array, Routing]:
    """(y, routing) of the layer, compiled as one program."""
    graphdef, state = nnx.split(layer)
    call = lambda state, x, c: nnx.merge(graphdef, state).routed(x, Context(**c, **static))  # noqa: E731
    static = {name: context.pop(name) for name in ("selection", "training") if name in context}
    return jax.jit(call)(state, jnp.asarray(x, jnp.float32), context)


def blind_to_the_future(layer: RoutedLayer, x: np.ndarray, change: int, **context) -> None:
    """Under "threshold" selection a token's output does not depend on later tokens."""
    context = Context(selection="threshold", **context)
    call = jax.jit(lambda x: layer.routed(x, context)[0])
    other = x.copy()
    other[:, change:] = np.random.default_rng(3).normal(size=other[:, change:].shape) * 3
    a, b = call(jnp.asarray(x, jnp.float32)), call(jnp.asarray(other, jnp.float32))
    np.testing.assert_allclose(a[:, :change], b[:, :change], atol=1e-6)
    assert np.abs(np.asarray(a - b)[:, change:]).max() > 1e-3


def executions_agree(
    make: Callable[[str], RoutedLayer], x: np.ndarray, names=("dense", "capacity", "ragged"), **context
):
    """All ways of computing give one output and one gradient by the input."""
    context = Context(**context)
    x = jnp.asarray(x, jnp.float32)
    results = []
    for name in names:
        layer = make(name)
        results.append(
            jax.jit(jax.value_and_grad(lambda x, layer=layer: jnp.sin(layer.routed(x, context)[0]).sum()))(x)
        )
    for value, grad in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grad, results[0][1], atol=2e-5 * np.abs(results[0][1]).max())


def router_gradients(layer: RoutedLayer, x: np.ndarray) -> np.ndarray:
    """[batch, seq]: the largest entry of the gradient of each token's output by the router matrix."""
    graphdef, state = nnx.split(layer)
    weight = state["router"]["weight"]
    x = jnp.asarray(x, jnp.float32)
    mix = jnp.asarray(np.random.default_rng(11).normal(size=x.shape), jnp.float32)

    def outputs(value):
        moved = nnx.merge_state(state, nnx.State({"router": {"weight": weight.replace(value)}}))
        return (nnx.merge(graphdef, moved).routed(x, Context())[0] * mix).sum(-1).reshape(-1)

    return np.abs(np.asarray(jax.jit(jax.jacrev(outputs))(weight[...]))).max((1, 2)).reshape(x.shape[:2])
