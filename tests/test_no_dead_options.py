"""Every setting of a model does something: another legal value changes its parameters or its programs.

Each field of each node in the recipes' trees is looked at once, on the first recipe that has it, at the size of a test.
Nothing is compiled: parameters are shapes with their metadata, programs are traced.
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shapes import reduced

from adaptive import settings
from adaptive.account import account
from adaptive.errors import RecipeError
from adaptive.layers.moe.routers import adamoe, duo_llm, dynamoe, longcat, remoe, versatile
from adaptive.layers.moe.routers import expert_choice as of_experts
from adaptive.layers.moe.routers import token_choice as of_tokens
from adaptive.models import language_model
from adaptive.models.depth import token_choice
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import AxisRules, placement
from adaptive.recipe import list_recipes, load
from adaptive.runs.state import abstract_model

Model = language_model.Settings
ROWS, SEQ = 2, 24


# What a setting needs beside it: fields of the same node, with "^" of the node above.
FULL = {"capacity_factor": 1.0}
SCHEDULED = {"schedule": "linear", "k_min": 1, "k_max": 3, "experts_per_token": 2.0, "^experts": 8}
NEEDS: dict[tuple[type[Any], str], dict[str, Any]] = {
    (token_choice.Settings, "bias_update_rate"): {"balancing": "loss_free"},
    (token_choice.Settings, "capacities"): {"execution": "capacity"},
    **{(router.Settings, name): FULL for router in (adamoe, longcat, of_tokens) for name in ("capacity_group", "drop")},
    (adamoe.Settings, "late_coefficient"): {"late_after": 5},
    (duo_llm.Settings, "untrained"): {"phase": "random"},
    (dynamoe.Settings, "least"): {"schedule": "uniform"},
    (of_experts.Settings, "chunk"): {"group": "chunk"},
    (of_experts.Settings, "k_min"): SCHEDULED | {"k_min": 2, "k_max": 2},
    (of_experts.Settings, "k_max"): SCHEDULED | {"k_min": 2, "k_max": 2},
    (of_experts.Settings, "row_slack"): SCHEDULED,
    (of_experts.Settings, "rows_of"): SCHEDULED | {"row_slack": 1.25},
    (of_experts.Settings, "most_per_token"): {"experts_per_token": 2.0},
    (of_experts.Settings, "sigma"): {
        "schedule": "gaussian",
        "k_min": 7,
        "k_max": 8,
        "experts_per_token": 7.5,
        "row_slack": 0.0,
    },
    (of_experts.Settings, "slack"): {"select": "threshold"},
    (of_experts.Settings, "predictor_coefficient"): {"decode": "predictor"},
    (of_experts.Settings, "scale_to_shared"): {"^shared_size": 8},
    (remoe.Settings, "norm_eps"): {"normalise": True},
    (of_tokens.Settings, "bias_rate"): {"bias": True},
    (of_tokens.Settings, "kept_groups"): {"groups": 4},
    (of_tokens.Settings, "group_score"): {"groups": 4},
    (of_tokens.Settings, "importance_coefficient"): {"noise": 1.0},
    (of_tokens.Settings, "load_of"): {"noise": 1.0, "importance_coefficient": 0.1},
    (of_tokens.Settings, "cosine_size"): {"score": "cosine"},
    (of_tokens.Settings, "scale_to_shared"): {"^shared_size": 8},
    (of_tokens.Settings, "capacity_rule"): FULL,
    (of_tokens.Settings, "least_slots"): FULL,
    (versatile.Settings, "hidden"): {"slices": "strided"},
}

# What changes with a setting, as it could not alone.
TOGETHER: dict[tuple[type[Any], str], dict[str, Any]] = {
    (of_experts.Settings, "k_min"): {"k_max": 3},
    (of_experts.Settings, "k_max"): {"k_min": 1},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One field of one kind of node, and where a model has it."""

    model: Model
    path: str
    node: type
    field: str

    def __str__(self) -> str:
        return f"{self.node.__module__.removeprefix('adaptive.')}.{self.field}"

    def before(self) -> Model:
        """The model with what the setting needs beside it."""
        return changed(self.model, self.path, **NEEDS.get((self.node, self.field), {}))

    def after(self) -> list[Model]:
        """The same with each other legal value."""
        before, kind = self.before(), settings.hints(self.node)[self.field]
        node = dict(settings.nodes(before, "model"))[self.path]
        value = getattr(node, self.field)
        more = TOGETHER.get((self.node, self.field), {})
        models = [changed(before, self.path, **{self.field: v}, **more) for v in others(kind, value) if v != value]
        return [model for model in models if valid(model)]


def cases() -> list[Case]:
    """Each on the smallest model that leaves the setting a choice."""
    found: dict[tuple[type, str], Case] = {}
    chosen: set[tuple[type, str]] = set()
    models = {reduced(load(name).model, layers=2, vocab_size=64) for name in list_recipes()}
    for model in sorted(models, key=lambda model: (len(list(settings.nodes(model, "model"))), str(model))):
        for path, node in settings.nodes(model, "model"):
            for field, kind, value in settings.fields(node):
                if settings.is_nodes(kind) or (dataclasses.is_dataclass(value) and not settings.is_choice(kind)):
                    continue
                key = (type(node), field.name)
                if key not in chosen:
                    found[key] = Case(model, path, type(node), field.name)
                    if found[key].after():
                        chosen.add(key)
    return list(found.values())


# Other values


def others(kind: Any, value: Any) -> Iterator[Any]:
    """Values of this type that may be legal, those that are most likely so first."""
    if settings.is_choice(kind):
        for text in settings.expected(kind).removeprefix("one of ").split(", "):
            yield settings.parse(kind, text, where="x")
        return
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        yield from args
    elif typing.get_origin(kind) is tuple:
        yield from _tuples(args[0], value)
    elif type(None) in args:
        yield from (0.5, 1, None)
    elif kind is bool:
        yield not value
    elif kind is int:
        yield from (value + 1, value * 2, value - 1, value // 2, 1, 2, 4, 0)
    elif kind is float:
        yield from (value * 2, value / 2, value + 1, value + 4, 0.5, 0.0, 2.0)


def _tuples(kind: type, value: tuple) -> Iterator[tuple]:
    if value:
        yield tuple(kind(x / 2) for x in value)
        yield tuple(kind(x * 2) for x in value)
    for n in range(1, 4):
        yield tuple(kind(x) for x in (4, 8, 12)[:n]) if kind is int else (1.0, 0.4, 0.3)[:n]


def changed(model: Model, path: str, **values: Any) -> Model:
    for name, value in values.items():
        at = f"{path.rpartition('.')[0]}.{name[1:]}" if name.startswith("^") else f"{path}.{name}"
        model = settings.with_leaf(model, at.partition(".")[2], value)
    return model


def valid(model: Model) -> bool:
    try:
        model.validate()
    except RecipeError:
        return False
    return True


# What a model is


@functools.lru_cache(maxsize=8)
def expected_pairs(model: Model) -> Any:
    """What routers are expected to choose, which plans and accounts go by."""
    return account(model, SEQ).forward_flops


@functools.lru_cache(maxsize=8)
def abstract(model: Model) -> Any:
    return abstract_model(lambda key: model.build(key, dtype=jnp.bfloat16))


@functools.lru_cache(maxsize=8)
def parameters(model: Model) -> Any:
    """Shapes with what is known of them, how they are drawn, and when they change."""
    _, state = abstract(model)
    known = [(path, v.get_value().shape, sorted(v.get_metadata().items())) for path, v in nnx.to_flat_state(state)]
    return text(repr(known)), model.changes(), model.warmup_steps()


@functools.lru_cache(maxsize=8)
def drawing(model: Model) -> Any:
    return traced(lambda key: nnx.state(model.build(key)), jax.eval_shape(lambda: jax.random.key(0)))


@functools.lru_cache(maxsize=8)
def training(model: Model) -> Any:
    return traced(functools.partial(through, model, "topk"), abstract(model)[1])


@functools.lru_cache(maxsize=8)
def causal(model: Model) -> Any:
    if nnx.merge(*abstract(model)).refuse_generation():
        return None
    return traced(functools.partial(through, model, "threshold"), abstract(model)[1])


@functools.lru_cache(maxsize=8)
def asked(model: Model) -> Any:
    each = np.ones(ROWS, np.int32)
    return traced(functools.partial(through, model, "topk", experts_per_token=each), abstract(model)[1])


@functools.lru_cache(maxsize=8)
def hidden(model: Model) -> Any:
    """As an objective has it that hides tokens."""
    shares = np.linspace(0.2, 0.9, 2 * ROWS, dtype=np.float32)
    return traced(functools.partial(through, model, "topk", rows=len(shares), mask_ratio=shares), abstract(model)[1])


@functools.lru_cache(maxsize=8)
def kept(model: Model) -> Any:
    """What generation keeps."""
    built = nnx.merge(*abstract(model))
    return None if built.refuse_cache() else text(str(jax.eval_shape(lambda: built.init_cache(ROWS, SEQ))))


def through(model: Model, selection: Any, state: Any, rows: int = ROWS, **asks: Any) -> Any:
    """A forward pass with its losses and the buffers after it, in training or as it generates."""
    built = nnx.merge(abstract(model)[0], state)
    tokens = jnp.zeros((rows, SEQ), jnp.int32)
    segments = jnp.ones((rows, SEQ), jnp.int32).at[:, -4:].set(2)
    out = built(
        tokens,
        segment_ids=segments,
        boundaries=tokens == 0,
        deterministic=selection == "threshold",
        selection=selection,
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0),
        **asks,
    )
    sums = out.trace.sums()
    after = built.next_buffers(sums) if selection == "topk" else ()
    return out.logits, out.aux.total(), out.aux.separate_total(), sums, after


def traced(function: Any, *arguments: Any) -> Any:
    """The program and its constants."""
    with placement(make_mesh(MeshConfig(), jax.devices()[:2]), AxisRules()):
        program = jax.make_jaxpr(function)(*arguments)
    return text(str(program)), tuple(constants(program))


def constants(program: Any) -> Iterator[bytes]:
    """Of a traced program and of those inside it."""
    for value in program.consts:
        yield np.asarray(value).tobytes()
    for equation in program.jaxpr.eqns:
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "consts")):
            if hasattr(inner, "consts"):
                yield from constants(inner)


def text(shown: str) -> str:
    """Without addresses, which differ each time."""
    return re.sub(r"0x[0-9a-f]+", "", shown)


def differs(a: Model, b: Model) -> bool:
    """What costs least is looked at first."""
    return any(
        look(a) != look(b) for look in (parameters, expected_pairs, kept, training, causal, drawing, asked, hidden)
    )


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_setting_does_something(case):
    before, after = case.before(), case.after()
    assert valid(before)
    assert after, "it has no other value"
    assert any(differs(before, model) for model in after)
