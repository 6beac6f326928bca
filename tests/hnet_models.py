"""Small H-Nets with weights drawn by numpy, for tests: nothing is compiled to make them, and nothing is at rest."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quick
from flax import nnx

from adaptive.models.build import build_model
from adaptive.models.config import RouterConfig, TransformerConfig
from adaptive.models.hnet_config import HNetConfig

BATCH, SEQ = 2, 24
LAYOUTS = {
    0: '["M1t1"]',
    1: '["m1", ["T1"], "t1"]',
    2: '["t1", ["m1", ["T2"], "M1"], "m1"]',
    3: '["m1", ["t1", ["m1", ["T1"], "t1"], "m1"], "t1"]',
}
WIDTHS = {0: (8,), 1: (8, 12), 2: (8, 8, 12), 3: (8, 8, 12, 16)}
SHAPES: dict[str, Any] = {
    "intermediates": (20,), "heads": (2,), "rotary_dims": (2,), "d_state": (4,), "ssm_head_dim": (4,),
    "ssm_block": (8,), "ratio_targets": (3.0,),
}  # fmt: skip
INSIDE = '["m1", ["model"], "t1"]'


def hnet(stages: int = 1, **settings: Any) -> TransformerConfig:
    """An H-Net of this many chunking stages; settings of HNetConfig."""
    own = {"layout": LAYOUTS[stages], "widths": WIDTHS[stages], **SHAPES, **settings}
    config = TransformerConfig(vocab_size=256, tie_embeddings=False, hnet=HNetConfig(**own))
    config.validate()
    return config


def composed(router: RouterConfig | None = None, *, hnet_settings: dict[str, Any] | None = None, **model: Any):
    """An H-Net around a model of three recursions of one layer between its own ends."""
    own = {"layout": INSIDE, "widths": (8, 16), **SHAPES, **(hnet_settings or {})}
    inner = {
        "hidden_size": 16, "intermediate_size": 24, "num_layers": 5, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
        "recursions": 3, "init_std": 0.2,
    }  # fmt: skip
    config = TransformerConfig(
        vocab_size=256, tie_embeddings=False, router=router or RouterConfig(), hnet=HNetConfig(**own), **(inner | model)
    )
    config.validate()
    return config


def filled(state: Any, seed: int = 0) -> Any:
    """A state of these shapes: weights of a size that lets every part say something, norms about 1, decays as usual."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> np.ndarray:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        noise = rng.normal(size=leaf.shape)
        if leaf.dtype != jnp.float32:
            raise AssertionError(f"{names}: {leaf.dtype}")
        if "a_log" in names:
            value = np.log(1 + 3 * rng.random(leaf.shape))
        elif "dt_bias" in names:
            value = noise - 1
        elif any("norm" in name for name in names) or "d" in names:
            value = 1 + 0.2 * noise
        elif "chunker" in names:
            value = np.eye(leaf.shape[-1]) + 0.3 * noise
        elif "embedding" in names:
            value = noise
        else:
            value = 0.3 * noise
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, state)


@functools.cache
def split_model(config: TransformerConfig, **options: Any) -> tuple[Any, Any]:
    """(graph definition, state) of the model; options of `build_model`."""
    abstract = nnx.eval_shape(lambda: build_model(config, key=jax.random.key(0), **options))
    graphdef, params, buffers = nnx.split(abstract, nnx.Param, ...)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), buffers)
    return nnx.split(nnx.merge(graphdef, *jax.tree.map(jnp.asarray, (filled(params), zeros))))


@functools.cache
def forward(config: TransformerConfig, **options: Any):
    """(tokens, **arrays) -> Output, compiled once per config, options and names of arrays."""
    graphdef, state = split_model(config)
    run = quick.jit(lambda state, tokens, arrays: nnx.merge(graphdef, state)(tokens, **options, **arrays))
    return lambda tokens, **arrays: run(state, tokens, arrays)


def random_bytes(seed: int = 1, batch: int = BATCH, seq: int = SEQ) -> np.ndarray:
    """Letters, digits, spaces and UTF-8, so that every chunker finds boundaries."""
    letters = np.frombuffer("abcde  ,1é東\n".encode(), np.uint8)
    return np.random.default_rng(seed).choice(letters, (batch, seq)).astype(np.int32)
