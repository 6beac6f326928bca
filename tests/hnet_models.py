"""Small models with weights drawn by numpy, for tests: little is compiled to make them, and nothing is at rest."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from flax import nnx

from adaptive.layers.site import Buffer
from adaptive.models.depth import Depth

BATCH, SEQ = 2, 24
LAYOUTS = {
    0: ("M1t1",),
    1: ("m1", ("T1",), "t1"),
    2: ("t1", ("m1", ("T2",), "M1"), "m1"),
    3: ("m1", ("t1", ("m1", ("T1",), "t1"), "m1"), "t1"),
}
WIDTHS = {0: (8,), 1: (8, 12), 2: (8, 8, 12), 3: (8, 8, 12, 16)}


def hnet(stages: int = 1, **settings: Any) -> shapes.Model:
    """An H-Net of this many chunking stages; settings of `shapes.hnet`."""
    return shapes.hnet(LAYOUTS[stages], **({"widths": WIDTHS[stages]} | settings))


def composed(depth: Depth | str = "all", *, outside: dict[str, Any] | None = None, **inside: Any) -> shapes.Model:
    """An H-Net around three recursions of one layer between its own ends; outside: settings of `shapes.hnet`, inside:
    of `shapes.recursive`."""
    shape = {"width": 16, "hidden": 24, "heads": 2, "kv_heads": 1}
    body = shapes.recursive(depth=depth, **(shape | inside)).body
    return shapes.hnet(("m1", body, "t1"), widths=(8, 16), **(outside or {}))


def filled(params: Any, seed: int = 0) -> Any:
    """Parameters like these: of a size that lets every part say something, norms about 1, decays as usual."""
    rng = np.random.default_rng(seed)

    def one(path: Any, param: nnx.Param) -> nnx.Param:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        about, shape = param.get_metadata(), param.shape
        noise = rng.normal(size=shape)
        if param.dtype != jnp.float32:
            raise AssertionError(f"{names}: {param.dtype}")
        if names[-1] == "a_log":
            value = np.log(1 + 3 * rng.random(shape))
        elif names[-1] == "dt_bias":
            value = noise - 1
        elif about["role"] in ("scale", "gated_scale") or names[-1] in ("d", "temperature"):
            value = 1 + 0.2 * noise
        elif "chunker" in names:
            value = np.eye(shape[-1]) + 0.3 * noise
        elif "embedding" in names:
            value = noise
        else:
            value = 0.3 * noise
        return param.replace(jnp.asarray(value, jnp.float32))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


@functools.cache
def split_model(settings: shapes.Model, **options: Any) -> tuple[Any, Any]:
    """(graph definition, state) of the model; options of `settings.build`."""
    make = lambda: settings.build(jax.random.key(0), **options)  # noqa: E731
    graphdef, params, _ = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    buffers = jax.jit(lambda: nnx.state(make(), Buffer))()
    spread = [(path, _let_some_through(path, value)) for path, value in nnx.to_flat_state(buffers)]
    return nnx.split(nnx.merge(graphdef, filled(params), nnx.from_flat_state(spread)))


def _let_some_through(path: Any, value: nnx.Variable) -> nnx.Variable:
    """Running thresholds of a kind that lets through some tokens and not others, as a trained model has."""
    if path[-1] != "threshold":
        return value
    return value.replace(value[...] * np.random.default_rng(value[...].size).uniform(0.5, 1, value.shape))


@functools.cache
def forward(settings: shapes.Model, **options: Any):
    """(tokens, **arrays) -> Output, compiled once per model, options and names of arrays."""
    graphdef, state = split_model(settings)
    run = jax.jit(lambda state, tokens, arrays: nnx.merge(graphdef, state)(tokens, **options, **arrays))
    return lambda tokens, **arrays: run(state, tokens, arrays)


@functools.cache
def continued(settings: shapes.Model, prompt: int):
    """tokens [batch, seq] -> (logits, depth) of a prompt of so many tokens and then single ones, with a cache; of this
    `state`, by default that of `split_model`."""
    graphdef, own = split_model(settings)

    @jax.jit
    def run(state: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(cache: Any, token: jax.Array) -> Any:
            out, cache = nnx.merge(graphdef, state).decode_step(token, cache)
            return cache, (out.logits[:, 0], out.trace.depth[:, 0])

        cache = nnx.merge(graphdef, state).init_cache(tokens.shape[0], tokens.shape[1] + 4)
        out, cache = nnx.merge(graphdef, state).prefill(tokens[:, :prompt], cache)
        cache, then = jax.lax.scan(step, cache, tokens[:, prompt:].T)
        join = lambda a, b: jnp.concatenate([a, jnp.swapaxes(b, 0, 1)], axis=1)  # noqa: E731
        return jax.tree.map(join, (out.logits, out.trace.depth), then)

    return lambda tokens, state=None: run(own if state is None else state, tokens)


def random_bytes(seed: int = 1, batch: int = BATCH, seq: int = SEQ) -> np.ndarray:
    """Letters, digits, spaces and UTF-8, so that every chunker finds boundaries."""
    letters = np.frombuffer("abcde  ,1é東\n".encode(), np.uint8)
    return np.random.default_rng(seed).choice(letters, (batch, seq)).astype(np.int32)
