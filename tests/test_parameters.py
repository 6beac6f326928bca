"""What parameters say of themselves: which are decayed, and that numbers have the same bits in every environment."""

import functools
from typing import Any

import jax
import pytest
import shapes
from flax import nnx

from adaptive.interop.families import families
from adaptive.interop.huggingface import settings_of
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.settings import RouterSettings
from adaptive.layers.site import STACKING
from adaptive.models.depth import Depth
from adaptive.optim.groups import decayed
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe, list_recipes, load
from adaptive.runs.platform import start_backend
from adaptive.runs.state import initial_state
from adaptive.training.program import Program
from adaptive.training.step import make_train_step

# Biases, scales of norms and vectors that have two dimensions beside those that stack layers, passes and experts.
WIDE = {"q_bias", "k_bias", "v_bias", "conv_x_bias", "norm", "constant"}


NEEDS: dict[str, dict[str, Any]] = {
    "blockffn": {"gated": False},
    "duo_llm": {"experts": 2},
    "versatile": {"experts": 8},
}


def routed(router: str) -> shapes.Model:
    options = {"router": RouterSettings.member(router)(), "experts": 4, **NEEDS.get(router, {})}
    return shapes.plain(2, feed_forward=experts.Settings(**options))


def with_depth(kind: str) -> shapes.Model:
    if kind == "mixture_of_depths":
        return shapes.recursive(4, 4, ends=0, depth=Depth.member(kind)(), shared="none")
    return shapes.mor(depth=Depth.member(kind)())


def foreign(kind: str, **config: int) -> shapes.Model:
    """A small model of a family of other people's."""
    return settings_of(families()[kind], {"vocab_size": 40, **config})


SMALL = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 7, "num_attention_heads": 4}
MODELS = {
    "gpt2": functools.partial(foreign, "gpt2", n_embd=16, n_layer=2, n_head=4),
    "gemma3": functools.partial(foreign, "gemma3", **SMALL),
    **{f"router {kind}": functools.partial(routed, kind) for kind in RouterSettings.kinds()},
    **{f"depth {kind}": functools.partial(with_depth, kind) for kind in Depth.kinds()},
    "biases": lambda: shapes.plain(2, bias="all", qk_norm="head", tie_embeddings=False),
    **{name: functools.partial(lambda name: shapes.reduced(load(name).model), name) for name in list_recipes()},
}


@functools.cache
def state_of(model: shapes.Model) -> Any:
    """Parameters and buffers, shapes alone, as they are made with JAX_ENABLE_X64."""
    with jax.enable_x64(True):
        return nnx.state(nnx.eval_shape(lambda: model.build(jax.random.key(0))))


def dtypes(tree: Any) -> dict[str, str]:
    return {jax.tree_util.keystr(path): str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", MODELS)
def test_what_has_one_dimension_is_not_decayed(name):
    params = nnx.to_flat_state(nnx.filter_state(state_of(MODELS[name]()), nnx.Param))
    keep = dict(nnx.to_flat_state(decayed(nnx.from_flat_state(params))))
    for path, param in params:
        axes = param.get_metadata()["axes"]
        assert len(axes) == len(param.shape), path
        dimensions = sum(axis not in STACKING for axis in axes)
        assert keep[path].get_raw_value() == (dimensions > 1 and path[-1] not in WIDE), path


@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_a_model_have_32_bits_in_every_environment(name):
    state = state_of(MODELS[name]())
    params, buffers = nnx.split_state(state, nnx.Param, ...)
    assert set(dtypes(params).values()) == {"float32"}
    assert set(dtypes(buffers).values()) <= {"float32", "int32", "bool"}


def step_of(name: str, *settings: str) -> tuple[Any, Any]:
    """State and metrics after a train step, shapes alone."""
    recipe = Recipe("r", model=shapes.reduced(load(name).model, layers=1)).with_(
        "train.batch_size=2", "data.seq_len=24", "train.device_batch_size=1", "train.compute_dtype=float32", *settings
    )
    program = Program(recipe, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    step = make_train_step(program.graphdef, program.tx, accumulation=program.accumulation)
    state = jax.eval_shape(lambda key: initial_state(program.build, program.tx, key), jax.random.key(0))
    with program.placed():
        return jax.eval_shape(step, state, program.abstract_batch())


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "optimizer"), [("moe_tc_tiny", "adamw"), ("mor_tiny", "muon"), ("hnet_tiny", "adamw")]
)
def test_a_step_keeps_its_bits_in_every_environment(name, optimizer):
    with jax.enable_x64(True):
        state, metrics = step_of(name, f"optimizer={optimizer}")
    assert set(dtypes(state).values()) == {"float32", "int32", "uint32"}
    assert {path: dtype for path, dtype in dtypes(metrics).items() if dtype not in ("float32", "int32")} == {}


@pytest.mark.compiles
def test_commands_switch_64_bits_off(capsys):
    with jax.enable_x64(False):
        start_backend()
        assert capsys.readouterr().err == ""
    before = jax.config.jax_enable_x64
    try:
        jax.config.update("jax_enable_x64", True)
        start_backend()
        assert not jax.config.jax_enable_x64 and "JAX_ENABLE_X64 is switched off" in capsys.readouterr().err
    finally:
        jax.config.update("jax_enable_x64", before)
